"""Sums of the gradient as a value: those of tiles merge, and give each its share of the whole's gradient.

Tolerances are those of test_gradient.py. The expected gradient is given the whole's moments too, so that what
merging them rounded is not counted twice.
"""

import itertools
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
from helpers import (
    ACTIVATIONS,
    DTYPES,
    EPS32,
    FAMILIES,
    LAYOUTS,
    RATIOS,
    activation_of_pytorch,
    assert_same_bits,
    in_layout,
    name_of,
    normal,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bits import HOW, OPTIONS, strided
from test_errors import BAD, SENTINEL, C, N, X, assert_refused, label
from test_fused import calls, data, lay_out
from test_gradient import (
    ACCURACY_SHAPES,
    BAD_DY,
    DY,
    accuracy_problem,
    assert_as_reference,
    assert_close,
    assert_same_gradients,
    backward,
    exact_gradient,
    expected_and_tolerances,
)
from test_gradient_bits import MORE_SHAPES, SHAPES, gradient_problem

import gn_fast
from gn_fast import GradientSums, Moments, reference

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def gradient_sums(dy, arguments, **more):
    return gn_fast.group_gradient_sums(dy, **(arguments | more))


def assert_same_sums(a, b, what=""):
    assert_same_bits(a.dweight, b.dweight, f"{what} dweight")
    assert_same_bits(a.dbias, b.dbias, f"{what} dbias")


def merged(parts):
    first, *others = parts
    return first.merge(*others)


def each_with_its_own(arguments):
    """The same call with a weight and a bias of each sample, whose gradients are the sums."""
    x, axis = arguments["x"], arguments.get("axis", 1)
    shape = x.shape[0], x.shape[axis]
    own = {
        name: np.broadcast_to(np.asarray(arguments.get(name, absent), np.float64), shape)
        for name, absent in (("weight", 1.0), ("bias", 0.0))
    }
    return arguments | own


def assert_sums_as_reference(s, dy, arguments, what=""):
    """Within the tolerance of dweight and dbias, of which they are the float64 values."""
    expected, tolerances = expected_and_tolerances(dy, **each_with_its_own(arguments))
    for name, result, value, tolerance in zip(
        ("dweight", "dbias"), (s.dweight, s.dbias), expected[1:3], tolerances[1:3], strict=True
    ):
        assert result.dtype == np.float64
        assert result.shape == value.shape
        assert_close(result, value, tolerance, f"{what} {name}")


# ---- tiles and their whole -------------------------------------------------------------------------------


def tiles_of(arguments, dy, d, cuts):
    """The call and dy of each tile, cut along dimension d."""
    x, axis = arguments["x"], arguments.get("axis", 1)
    mask_shape = list(x.shape)
    mask_shape[axis] = 1
    for start, stop in itertools.pairwise(cuts):
        part = (slice(None),) * d + (slice(start, stop),)
        tile = arguments | {"x": x[part]}
        if "residual" in arguments:
            tile["residual"] = arguments["residual"][part]
        if arguments.get("mask") is not None:
            tile["mask"] = np.broadcast_to(arguments["mask"], mask_shape)[part]
        yield part, tile, dy[part]


def moments_of(arguments):
    names = ("x", "num_groups", "axis", "mask")
    return gn_fast.group_moments(**{name: arguments[name] for name in names if name in arguments})


def assert_tiles_make_the_whole(arguments, dy, d, cuts, what=""):
    x, axis = arguments["x"], arguments.get("axis", 1)
    tiles = list(tiles_of(arguments, dy, d, cuts))
    m = arguments.get("moments")
    if m is None:
        m = merged([moments_of(tile) for _, tile, _ in tiles])
    whole = arguments | {"moments": m}
    s = merged([gradient_sums(part_of_dy, tile, moments=m) for _, tile, part_of_dy in tiles])
    assert_sums_as_reference(s, dy, whole, what)
    expected, tolerances = expected_and_tolerances(dy, **whole)
    dx, dresidual = (np.empty(x.shape, x.dtype) for _ in range(2))
    ours = None
    for part, tile, part_of_dy in tiles:
        dx[part], *of_parameters = backward(part_of_dy, tile, moments=m, sums=s)
        if "residual" in arguments:
            dresidual[part] = of_parameters.pop()
        for name, result, value, tolerance in zip(
            ("dweight", "dbias"), of_parameters, expected[1:3], tolerances[1:3], strict=True
        ):
            assert (result is None) == (value is None)
            if result is not None:
                assert_close(result, value, tolerance, f"{what} {name}")
        ours = ours or of_parameters
        for result, first in zip(of_parameters, ours, strict=True):
            if result is not None:
                assert_same_bits(result, first, f"{what}: of another tile")
    assert_close(seen_as(dx, axis, expected[0]), expected[0], tolerances[0], f"{what} dx")
    if "residual" in arguments:
        assert_close(seen_as(dresidual, axis, expected[3]), expected[3], tolerances[3], f"{what} dresidual")


def seen_as(values, axis, like):
    return np.moveaxis(values, axis, 1).reshape(like.shape)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(), st.data())
def test_tiles_of_every_combination_have_the_gradient_of_the_whole(arguments, drawn):
    x = arguments["x"]
    dtype = drawn.draw(st.sampled_from(DTYPES), label="dtype of dy")
    dy = lay_out(drawn.draw, data(drawn.draw, x.shape, dtype))
    spatial = [d for d in range(1, x.ndim) if d != arguments["axis"] % x.ndim]
    if spatial:
        d = drawn.draw(st.sampled_from(spatial), label="cut along")
        inner = drawn.draw(st.lists(st.integers(0, x.shape[d]), max_size=3), label="cuts")
        cuts = [0, *sorted(inner), x.shape[d]]
    else:  # in two dimensions there is one tile
        d, cuts = 0, [0, x.shape[0]]
    assert_tiles_make_the_whole(arguments, dy, d, cuts)


@every_dtype
@both_layouts
@every_activation
def test_tiles_of_long_and_short_channels(activation, layout, dtype):
    rng = np.random.default_rng(0)
    for shape, d, cuts in (
        ((2, 6, 70, 61), 2, [0, 11, 40, 70]),
        ((2, 12, 5, 6), 3, [0, 1, 1, 4, 6]),  # short, and an empty one
        ((1, 2, 70001), 2, [0, 30000, 70001]),  # more than a chunk, and than a tile of memory
        ((3, 1030, 4), 2, [0, 3, 4]),
    ):
        arguments = {
            "x": in_layout(normal(rng, shape, dtype, mean=3), layout),
            "num_groups": 2,
            "weight": normal(rng, shape[1], dtype),
            "bias": normal(rng, shape[:2], dtype),
            "residual": in_layout(normal(rng, shape, dtype), layout),
            "mask": rng.random((shape[0], 1, *shape[2:])) < 0.8,
            "activation": activation,
        }
        if shape[1] == 2:
            arguments["num_groups"] = 1
        dy = in_layout(normal(rng, shape, dtype), layout)
        assert_tiles_make_the_whole(arguments, dy, d, cuts, str(shape))
        plain = {name: arguments[name] for name in ("x", "num_groups", "weight", "activation")}
        assert_tiles_make_the_whole(plain, dy, d, cuts, f"{shape} plain")


def test_the_reference_agrees_with_itself_in_tiles():
    """In float64, to some roundings of sums of tens of terms of size 10 at most."""
    rng = np.random.default_rng(0)
    for weight_shape, activation in itertools.product(((4,), (2, 4)), ACTIVATIONS):
        x, dy, residual = rng.standard_normal((3, 2, 4, 9))
        arguments = {
            "num_groups": 2,
            "weight": rng.standard_normal(weight_shape),
            "bias": rng.standard_normal(4),
            "activation": activation,
        }
        mask = rng.random((2, 1, 9)) < 0.7
        whole = reference.group_norm_backward(dy, x, **arguments, residual=residual, mask=mask)
        parts = [np.s_[..., :4], np.s_[..., 4:4], np.s_[..., 4:]]
        m = merged([reference.group_moments(x[p], 2, mask=mask[p]) for p in parts])
        own = [arguments | {"x": x[p], "residual": residual[p], "mask": mask[p], "moments": m} for p in parts]
        s = merged([reference.group_gradient_sums(dy[p], **a) for p, a in zip(parts, own, strict=True)])
        each = [reference.group_norm_backward(dy[p], **a, sums=s) for p, a in zip(parts, own, strict=True)]
        close = {"rtol": 0, "atol": 1e-13}
        np.testing.assert_allclose(np.concatenate([g[0] for g in each], -1), whole[0], **close)
        np.testing.assert_allclose(np.concatenate([g[3] for g in each], -1), whole[3], **close)
        for _, dweight, dbias, _ in each:
            np.testing.assert_allclose(dweight, whole[1], **close)
            np.testing.assert_allclose(dbias, whole[2], **close)


@both_layouts
@every_dtype
def test_sums_of_x_itself_give_the_bits_of_long_channels_again(dtype, layout):
    """Not those of short channels, whose a and b are summed by value."""
    for shape, num_groups in (((2, 6, 43, 41), 3), ((1, 2, 260, 257), 1), ((5, 8, 16), 4)):
        arguments = gradient_problem(shape, num_groups, dtype, layout)
        dy, m = arguments.pop("dy"), moments_of(arguments)
        s = gradient_sums(dy, arguments, moments=m)
        again = backward(dy, arguments, moments=m, sums=s)
        assert_same_gradients(again, backward(dy, arguments, moments=m), f"{shape}")


@both_layouts
def test_sums_without_moments_are_with_those_of_x(layout):
    for shape, num_groups in (((2, 6, 43, 41), 3), ((3, 8, 5), 2), ((3, 8), 2)):
        arguments = gradient_problem(shape, num_groups, np.float32, layout)
        assert_same_sums(
            gn_fast.group_gradient_sums(**arguments),
            gn_fast.group_gradient_sums(**arguments, moments=moments_of(arguments)),
            f"{shape}",
        )


@both_layouts
def test_a_weight_counts_only_inside_an_activation(layout):
    arguments = gradient_problem((2, 6, 9, 7), 3, np.float32, layout, options=["weight", "bias"])
    plain = {name: arguments[name] for name in ("dy", "x", "num_groups")}
    assert_same_sums(gn_fast.group_gradient_sums(**arguments), gn_fast.group_gradient_sums(**plain))
    bent = gn_fast.group_gradient_sums(**arguments, activation="silu")
    assert not np.allclose(bent.dbias, gn_fast.group_gradient_sums(**plain, activation="silu").dbias)


# ---- accuracy --------------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("ratio", [*RATIOS[:-1], 1e5])
@pytest.mark.parametrize(("shape", "num_groups"), ACCURACY_SHAPES, ids=name_of)
def test_sums_are_within_1e_6_of_the_largest_at_any_mean(shape, num_groups, ratio, layout):
    dy, x, weight = accuracy_problem(shape, ratio, layout)[:3]
    s = gn_fast.group_gradient_sums(dy, x, num_groups)
    exact = [exact_gradient(dy[n : n + 1], x[n : n + 1], num_groups, weight)[2:] for n in range(len(x))]
    for result, values in ((s.dweight, [e[0] for e in exact]), (s.dbias, [e[1] for e in exact])):
        assert np.abs(result - values).max() <= 1e-6 * np.abs(values).max()


# ---- constants -------------------------------------------------------------------------------------------


@every_activation
@both_layouts
def test_with_zeros_the_moments_are_constants_as_in_pytorch(layout, activation):
    """Statistics detached; the true dweight and dbias are the sums over the samples."""
    torch = pytest.importorskip("torch")
    act = activation_of_pytorch(activation)
    rng = np.random.default_rng(0)
    for shape in ((2, 6, 7, 5), (2, 6, 3), (3, 6)):
        x, dy, residual = (in_layout(rng.standard_normal(shape), layout) for _ in range(3))
        weight, bias = rng.standard_normal((2, 6))
        leaves = [
            torch.tensor(np.ascontiguousarray(a), requires_grad=True) for a in (x, weight, bias, residual)
        ]
        slabs = leaves[0].reshape(shape[0], 3, -1)
        mean = slabs.mean(-1, keepdim=True).detach()
        var = slabs.var(-1, keepdim=True, correction=0).detach()
        xhat = ((slabs - mean) / torch.sqrt(var + 0.1)).reshape(shape)
        by_channel = (1, 6, *(1,) * (len(shape) - 2))
        y = act(xhat * leaves[1].reshape(by_channel) + leaves[2].reshape(by_channel) + leaves[3])
        y.backward(torch.tensor(np.ascontiguousarray(dy)))
        arguments = {
            "x": x, "num_groups": 3, "weight": weight, "bias": bias, "eps": 0.1,
            "residual": residual, "activation": activation, "moments": gn_fast.group_moments(x, 3),
        }  # fmt: skip
        for module in (gn_fast, reference):
            constants = GradientSums.zeros(shape[0], 6)
            dx, dweight, dbias, dresidual = module.group_norm_backward(dy, **arguments, sums=constants)
            s = module.group_gradient_sums(dy, **arguments)
            np.testing.assert_array_equal(dweight, 0)
            np.testing.assert_array_equal(dbias, 0)
            for result, leaf in zip((dx, s.dweight.sum(0), s.dbias.sum(0), dresidual), leaves, strict=True):
                np.testing.assert_allclose(result, leaf.grad.numpy(), rtol=0, atol=1e-12)


UNUSUAL = [np.nan, np.inf, -np.inf, 1e39, -1e300, 3.0]


@every_dtype
@both_layouts
@pytest.mark.parametrize("mean", UNUSUAL)
def test_moments_of_nothing_are_constants_whatever_their_mean(mean, layout, dtype):
    """y, dx and the sums as in the reference, for means that no data have."""
    rng = np.random.default_rng(0)
    for shape, activation in itertools.product(((2, 6, 43, 41), (2, 6, 5), (2, 6)), ACTIVATIONS):
        x, dy = (in_layout(normal(rng, shape, dtype), layout) for _ in range(2))
        zero = np.zeros((2, 3), int)
        arguments = {
            "x": x,
            "num_groups": 3,
            "weight": normal(rng, 6),
            "bias": normal(rng, 6),
            "eps": 0.25,
            "activation": activation,
            "moments": Moments(zero, np.where([[1, 1, 0], [0, 1, 1]], mean, 0.0), zero),
        }
        what = f"{shape} {activation}"
        y, expected = (module.group_norm(**arguments) for module in (gn_fast, reference))
        assert_same_to_some_ulp(y, expected, what)
        for s in (None, GradientSums(*normal(rng, (2, 2, 6)))):
            results = backward(dy, arguments, sums=s)
            expected = reference.group_norm_backward(dy, **arguments, sums=s)
            assert_same_to_some_ulp(results[0], expected[0], f"{what} dx")
        s, expected = (module.group_gradient_sums(dy, **arguments) for module in (gn_fast, reference))
        assert_same_to_some_ulp(s.dbias, expected.dbias, f"{what} dbias", size=math.prod(shape[2:]))
        assert_same_to_some_ulp(s.dweight, expected.dweight, f"{what} dweight", size=math.prod(shape[2:]))


def assert_same_to_some_ulp(result, expected, what, size=1):
    """The same NaNs and infinities, and what is finite within 16 ulp of float32 or 2 of 16 bits."""
    error = max(16 * EPS32, 2 * float(ml_dtypes.finfo(result.dtype).eps))
    result, expected = result.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_allclose(result, expected, rtol=error, atol=error * size, err_msg=what)


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6), (2, 1030, 3)], ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-41, 1e-38, 1e34])
def test_short_channels_beyond_what_float32_carries_are_activated_in_float64(scale, activation, shape):
    rng = np.random.default_rng(0)
    x = (scale * (1 + rng.standard_normal(shape))).astype(np.float32)
    arguments = {
        "x": x,
        "num_groups": 2,
        "weight": normal(rng, shape[1]),
        "eps": 0.0,
        "activation": activation,
    }
    dy = normal(rng, shape)
    assert_sums_as_reference(gradient_sums(dy, arguments), dy, arguments)
    assert_as_reference(backward(dy, arguments), dy, arguments)


# ---- padding ---------------------------------------------------------------------------------------------

PADDED = [
    ((2, 6, 43, 41), (2, 1, 43, 41)),
    ((2, 6, 5, 3), (2, 1, 5, 3)),  # short
    ((2, 6, 5), (1, 1, 5)),
    ((2, 1030, 3), (2, 1, 3)),
    ((1, 2, 5001), (1, 1, 5001)),  # more than a tile of memory
    ((4, 6), (4, 1)),
]


def padding_problem(shape, mask_shape, dtype, layout, poison, options):
    """A call and its dy, with poison in padding where dy is 0, and the same with zeros there."""
    rng = np.random.default_rng(0)
    mask = rng.random(mask_shape) < 0.6
    mask.ravel()[:2] = True, False
    hidden = np.broadcast_to(~mask, shape)
    arrays = [normal(rng, shape, dtype) for _ in range(3)]
    dy, *others = (np.where(hidden, dtype.type(0), a) for a in arrays)
    calls = []
    for value in (poison, 0):
        x, residual = (in_layout(np.where(hidden, dtype.type(value), a), layout) for a in others)
        rng = np.random.default_rng(1)
        call = {"x": x, "num_groups": 2, "mask": mask}
        if "parameters" in options:
            call |= {"weight": normal(rng, shape[1], dtype), "bias": normal(rng, shape[:2], dtype)}
        if "residual" in options:
            call["residual"] = residual
        calls.append(call)
    return in_layout(dy, layout), hidden, *calls


@every_dtype
@both_layouts
@every_activation
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_padding_without_gradient_contributes_nothing_whatever_it_holds(poison, activation, layout, dtype):
    for (shape, mask_shape), options in itertools.product(PADDED, ([], ["parameters", "residual"])):
        dy, hidden, poisoned, clean = padding_problem(shape, mask_shape, dtype, layout, poison, options)
        what = f"{shape} {options}"
        results = backward(dy, poisoned, activation=activation)
        assert_same_gradients(results, backward(dy, clean, activation=activation), what)
        s = gradient_sums(dy, poisoned, activation=activation)
        assert_same_sums(s, gradient_sums(dy, clean, activation=activation), what)
        for result in (*results, s.dweight, s.dbias):
            assert result is None or np.isfinite(result.astype(np.float64)).all(), what
        np.testing.assert_array_equal(results[0][hidden], 0)
        m = moments_of(poisoned)
        again = backward(dy, poisoned, activation=activation, moments=m, sums=s)
        assert_same_gradients(again, backward(dy, clean, activation=activation, moments=m, sums=s), what)
        assert np.isfinite(again[0].astype(np.float64)).all(), what


@every_activation
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_padding_without_gradient_contributes_nothing_in_the_reference(poison, activation):
    for shape, mask_shape in PADDED[1:4] + PADDED[5:]:
        options = ["parameters", "residual"]
        dy, hidden, *both = padding_problem(shape, mask_shape, DTYPES[-1], LAYOUTS[0], poison, options)
        results, expected = (
            reference.group_norm_backward(dy, **call, activation=activation) for call in both
        )
        assert_same_gradients(results, expected, f"{shape}")
        assert_same_sums(*(reference.group_gradient_sums(dy, **call, activation=activation) for call in both))
        for result in results:
            assert np.isfinite(result).all()
        np.testing.assert_array_equal(results[0][hidden], 0)


@every_dtype
@both_layouts
def test_padding_that_has_a_gradient_is_in_the_sums_but_moves_no_statistics(layout, dtype):
    rng = np.random.default_rng(0)
    for shape, mask_shape in PADDED:
        mask = rng.random(mask_shape) < 0.5
        arguments = {"num_groups": 2, "mask": mask, "activation": "silu"}
        dy, arguments["x"] = (in_layout(normal(rng, shape, dtype), layout) for _ in range(2))
        assert_sums_as_reference(gradient_sums(dy, arguments), dy, arguments, f"{shape}")


# ---- the same bits ---------------------------------------------------------------------------------------


@every_dtype
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES + MORE_SHAPES, ids=name_of)
def test_threads_and_instruction_sets_change_nothing(three_processors, shape, num_groups, dtype, layout):
    for options in ([], OPTIONS):
        arguments = gradient_problem(shape, num_groups, dtype, layout, options=options)
        m = moments_of(arguments)
        for family in FAMILIES:
            with gn_fast.num_threads(1), gn_fast.use_isa(family[0]):
                expected = gn_fast.group_gradient_sums(**arguments)
                gradients = gn_fast.group_norm_backward(**arguments, moments=m, sums=expected)
            for level, threads in itertools.product(family, (1, 2, 3)):
                what = f"{options} {level}, {threads} threads"
                with gn_fast.use_isa(level), gn_fast.num_threads(threads):
                    assert_same_sums(gn_fast.group_gradient_sums(**arguments), expected, what)
                    again = gn_fast.group_norm_backward(**arguments, moments=m, sums=expected)
                assert_same_gradients(again, gradients, what)


@every_dtype
@both_layouts
def test_the_batch_and_strides_change_nothing(layout, dtype):
    for shape, num_groups in (((5, 6, 43, 41), 3), ((5, 8, 5, 3), 2), ((70, 12), 3), ((3, 2, 70001), 1)):
        arguments = gradient_problem(shape, num_groups, dtype, layout, options=["weight", "residual"])
        whole = gn_fast.group_gradient_sums(**arguments, activation="silu")
        for n in range(0, shape[0], 2):
            one = {k: v[n : n + 1] for k, v in arguments.items() if k in ("dy", "x", "residual")}
            s = gn_fast.group_gradient_sums(**(arguments | one), activation="silu")
            assert_same_bits(s.dweight[0], whole.dweight[n], f"{shape} {n}")
            assert_same_bits(s.dbias[0], whole.dbias[n], f"{shape} {n}")
        for how in HOW if len(shape) == 4 else ():
            apart = arguments | {name: strided(arguments[name], how) for name in ("dy", "x", "residual")}
            assert_same_sums(gn_fast.group_gradient_sums(**apart, activation="silu"), whole, f"{shape} {how}")


def test_merging_in_order_gives_the_bits_of_adding_in_order():
    rng = np.random.default_rng(0)
    parts = [GradientSums(*rng.standard_normal((2, 3, 4))) for _ in range(5)]
    s = merged(parts)
    for field in ("dweight", "dbias"):
        first, *others = (getattr(part, field).copy() for part in parts)
        for other in others:
            first += other
        assert_same_bits(getattr(s, field), first)
    assert_same_sums(parts[0].merge(*parts[1:3]).merge(*parts[3:]), s)
    assert_same_sums(GradientSums.zeros(3, 4).merge(*parts), s)


@both_layouts
def test_the_same_tiling_gives_the_same_bits(three_processors, layout):
    arguments = gradient_problem((2, 6, 61, 47), 3, np.float32, layout, options=["weight", "residual"])
    dy = arguments.pop("dy")

    def results(threads):
        tiles = list(tiles_of(arguments, dy, 2, [0, 20, 21, 61]))
        with gn_fast.num_threads(threads):
            m = merged([moments_of(tile) for _, tile, _ in tiles])
            s = merged([gradient_sums(d, tile, moments=m) for _, tile, d in tiles])
            return [backward(d, tile, moments=m, sums=s) for _, tile, d in tiles]

    first = results(1)
    for threads in (1, 2, 3):
        for again, expected in zip(results(threads), first, strict=True):
            assert_same_gradients(again, expected, f"{threads} threads")


# ---- nothing, and memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (2, 4, 3, 0), (2, 0), (2, 0, 3), (0, 0, 0)])
@pytest.mark.parametrize("axis", [1, -1])
def test_sums_of_nothing_are_zeros_and_an_empty_tile_has_the_gradient_of_the_whole(shape, axis):
    n, c = shape[:2]
    x = np.moveaxis(np.zeros(shape, np.float32), 1, axis)
    rng = np.random.default_rng(0)
    for module in (gn_fast, reference):
        s = module.group_gradient_sums(x, x, 2, axis=axis, residual=x, activation="mish")
        for result in (s.dweight, s.dbias):
            assert_same_bits(result, np.zeros((n, c)))
        s = GradientSums(*rng.standard_normal((2, n, c)))
        m = Moments(np.full((n, 2), 7), np.zeros((n, 2)), np.ones((n, 2)))
        for w in ((c,), (n, c)):
            dx, dweight, dbias = module.group_norm_backward(
                x, x, 2, np.ones(w), np.ones(w), axis=axis, moments=m, sums=s
            )
            assert dx.shape == x.shape
            for result, rows in ((dweight, s.dweight), (dbias, s.dbias)):
                assert result.shape == w
                np.testing.assert_allclose(result, rows if w == (n, c) else rows.sum(0), rtol=1e-15)


@both_layouts
def test_sums_may_lie_in_memory_as_they_like_and_are_not_changed(layout):
    for shape in ((3, 6, 43, 41), (3, 6, 5), (3, 6)):
        arguments = gradient_problem(shape, 3, np.float64, layout, options=["weight", "bias"])
        m = moments_of(arguments)
        s = gn_fast.group_gradient_sums(**arguments)
        before = GradientSums(s.dweight.copy(), s.dbias.copy())
        expected = gn_fast.group_norm_backward(**arguments, moments=m, sums=s)
        assert_same_sums(s, before)
        other = GradientSums(np.asfortranarray(s.dweight), s.dbias.astype(">f8")[::-1][::-1])
        assert_same_gradients(gn_fast.group_norm_backward(**arguments, moments=m, sums=other), expected)
        # `out` on top of them: as if they had been copied.
        memory = np.zeros(arguments["x"].size)
        out = memory.reshape(shape)
        there = GradientSums(memory[:18].reshape(3, 6), s.dbias)
        there.dweight[...] = s.dweight
        arguments["x"] = np.ascontiguousarray(arguments["x"])
        expected = gn_fast.group_norm_backward(**arguments, moments=m, sums=s)
        assert_same_gradients(
            gn_fast.group_norm_backward(**arguments, moments=m, sums=there, out=out), expected
        )


# ---- bad input -------------------------------------------------------------------------------------------

MOMENTS = gn_fast.group_moments(X, 2)

BAD_SUMS = [
    ("sums", (np.ones((N, C)), np.ones((N, C))), TypeError, "tuple"),
    ("sums", np.ones((N, C)), TypeError, "ndarray"),
    ("sums", True, TypeError, "bool"),
    ("sums", MOMENTS, TypeError, "Moments"),
    ("sums", GradientSums.zeros(N, 2), ValueError, "(2, 2)"),
    ("sums", GradientSums.zeros(1, C), ValueError, "(1, 6)"),
    ("sums", GradientSums.zeros(C, N), ValueError, "(6, 2)"),
]


@pytest.mark.parametrize(("name", "value", "error", "was"), BAD_SUMS, ids=label)
def test_bad_sums_are_refused_and_nothing_written(name, value, error, was):
    out = np.full_like(X, SENTINEL)
    arguments = {"dy": DY, "x": X, "num_groups": 2, "moments": MOMENTS, "out": out, name: value}
    assert_refused(lambda: gn_fast.group_norm_backward(**arguments), name, error, was)
    assert (out == SENTINEL).all()


def test_sums_without_moments_are_refused():
    """The moments of a tile are never those that the sums of its whole were taken with."""
    s, out = GradientSums.zeros(N, C), np.full_like(X, SENTINEL)
    call = {"dy": DY, "x": X, "num_groups": 2, "sums": s, "out": out}
    assert_refused(lambda: gn_fast.group_norm_backward(**call), "sums", ValueError, "moments=None")
    assert (out == SENTINEL).all()
    with pytest.raises(ValueError, match="moments must be given with sums"):
        reference.group_norm_backward(DY, X, 2, sums=s)
    with pytest.raises(ValueError, match="sums must have the shape"):
        reference.group_norm_backward(DY, X, 2, moments=MOMENTS, sums=GradientSums.zeros(N, 2))


@pytest.mark.parametrize(("name", "value", "error", "was"), BAD + BAD_DY, ids=label)
def test_group_gradient_sums_refuses(name, value, error, was):
    arguments = {"dy": DY, "x": X, "num_groups": 2} | {name: value}
    assert_refused(lambda: gn_fast.group_gradient_sums(**arguments), name, error, was)


# ---- the value -------------------------------------------------------------------------------------------


def test_sums_are_a_frozen_value_that_can_be_sent():
    s = GradientSums(np.float32([[1, 2]]), [[3, 4]])
    assert s.dweight.dtype == s.dbias.dtype == np.float64
    with pytest.raises(AttributeError):
        s.dbias = s.dweight
    sent = pickle.loads(pickle.dumps(s))
    assert_same_sums(sent, s)
    assert repr(sent) == "GradientSums(dweight=array([[1., 2.]]), dbias=array([[3., 4.]]))"
    assert sent != s  # by identity, as Moments are
    assert s == s
    for part in (gn_fast.group_gradient_sums(DY, X, 2), GradientSums.zeros(2, 3)):
        assert_same_sums(pickle.loads(pickle.dumps(part)), part)


@pytest.mark.parametrize(
    ("error", "name", "arrays"),
    [
        (ValueError, "dweight", (0.0, 0.0)),
        (ValueError, "dweight", ([1.0], [1.0])),
        (ValueError, "dbias", ([[1.0]], [[0.0, 0.0]])),
        (ValueError, "dbias", ([[1.0]], [0.0])),
        (TypeError, "dweight", ([["a"]], [[0.0]])),
        (TypeError, "dbias", ([[0.0]], [[1j]])),
        (TypeError, "dbias", ([[0.0]], [[True]])),
    ],
)
def test_sums_refuse_what_cannot_be(error, name, arrays):
    with pytest.raises(error, match=f"^{name} must"):
        GradientSums(*arrays)


def test_only_sums_of_the_same_shape_merge():
    s = GradientSums.zeros(1, 2)
    with pytest.raises(ValueError, match=r"^others must .*\(1, 2\).*\(2, 1\)"):
        s.merge(GradientSums.zeros(2, 1))
    with pytest.raises(TypeError, match=r"^others must .*tuple"):
        s.merge(([[0.0, 0.0]], [[0.0, 0.0]]))


def test_merging_changes_no_part_and_lets_nan_and_infinity_be():
    a = GradientSums([[np.inf, 1.0]], [[np.nan, 1e308]])
    b = GradientSums([[-np.inf, 2.0]], [[1.0, 1e308]])
    with np.errstate(all="raise"):
        s = a.merge(b)
    np.testing.assert_array_equal(s.dweight, [[np.nan, 3]])
    np.testing.assert_array_equal(s.dbias, [[np.nan, np.inf]])
    assert (a.dweight[0, 1], b.dbias[0, 1]) == (1, 1e308)
    alone = a.merge()
    assert alone is not a
    assert_same_sums(alone, a)


@pytest.mark.parametrize(
    ("name", "n", "c", "error"),
    [("n", -1, 2, ValueError), ("c", 2, -1, ValueError), ("n", 1.0, 2, TypeError), ("c", 2, None, TypeError)],
)
def test_zeros_of_no_size_are_refused(name, n, c, error):
    with pytest.raises(error, match=f"^{name} must"):
        GradientSums.zeros(n, c)

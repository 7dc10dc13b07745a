"""Everything in one call, against the reference: every option, dtype, layout, stride and aliasing.

The tolerance is that of test_accuracy.py for the argument z of the activation, with |residual| in the scale,
times the activation's largest slope; on top come 4 ulp of the activation itself.
"""

import functools
import itertools
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
from helpers import (
    ACTIVATIONS,
    DTYPES,
    EPS32,
    EPS64,
    LAYOUTS,
    LEVELS,
    activation_of_pytorch,
    assert_same_bits,
    assert_same_moments,
    far_out,
    in_layout,
    name_of,
    normal,
    spacing,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reference import exact_activation

import gn_fast
from gn_fast import Moments, reference

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def steps_of_exp(z, activation):
    """How many ulp float64's own exp, erfc and tanh may be off on the left, where they are e^u: about u."""
    t = np.clip(-z, 0, 40)
    without = dict.fromkeys((None, "relu", "leaky_relu", "hardswish"), 0)
    return 1 + {"gelu": t**2 / 2, "gelu_tanh": 1.6 * t + 0.0714 * t**3, **without}.get(activation, t)


def expected_and_tolerance(x, num_groups, weight=None, bias=None, eps=1e-5, *, axis=1, residual=None,
                           activation=None, mask=None, moments=None):  # fmt: skip
    wide = {"axis": axis, "mask": mask, "moments": moments, "eps": eps}
    with np.errstate(all="ignore"):
        values = x.astype(np.float64)
        xhat, m = reference.group_norm(values, num_groups, **wide, return_moments=True)
        z = reference.group_norm(values, num_groups, weight, bias, residual=residual, **wide)
        y = reference.group_norm(
            values, num_groups, weight, bias, residual=residual, activation=activation, **wide
        )

        def spread(v):
            v = np.repeat(v, x.shape[axis] // v.shape[1], 1) if v.ndim == 2 else v[None]
            return np.moveaxis(v.reshape(*v.shape, *(1,) * (x.ndim - 2)), 1, axis)

        w = 1.0 if weight is None else np.abs(spread(np.asarray(weight, np.float64)))
        b = 0.0 if bias is None else np.abs(spread(np.asarray(bias, np.float64)))
        r = 0.0 if residual is None else np.abs(np.asarray(residual, np.float64))
        offset = w * spread(np.abs(m.mean) * m.rstd(eps))
        # The reference sums in float64: its error near the mean is measured at one standard deviation.
        steepest = 1.5 if activation == "hardswish" else 1.13  # at 3; of the others that of gelu at sqrt(2)
        own = 4 * EPS64 * (w * (np.abs(xhat) + 1) + offset + b + r)
        if x.dtype.itemsize == 8 or (x.dtype.kind != "f" and x.dtype != DTYPES[1]):
            error = 2 * own
            error = steepest * error + 8 * EPS64 * steps_of_exp(z, activation) * np.abs(y) + 5e-324
        else:
            error = 2 * EPS32 * (w * (np.abs(xhat) + 1 / 16) + b + r) + own
            if activation is not None:
                # Subnormal results are off by spacings.
                error = steepest * error + 4 * EPS32 * np.abs(y) + 4 * 1.4e-45
            if x.dtype.itemsize == 2:
                error = error + 0.5 * spacing(np.where(np.isfinite(y), np.abs(y) + error, 1), x.dtype)
    return y, error


def assert_as_reference(result, arguments, what=""):
    expected, tolerance = expected_and_tolerance(**arguments)
    largest = float(ml_dtypes.finfo(result.dtype).max)
    result = result.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected), what)
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(result[infinite], expected[infinite], what)
    tolerance = np.broadcast_to(tolerance, expected.shape)
    with np.errstate(invalid="ignore"):
        # Where the exact value may lie beyond the largest of the dtype, infinity is right.
        beyond = np.isinf(result) & (np.abs(expected) + tolerance >= largest) & (result * expected > 0)
        compared = np.isfinite(expected) & ~beyond
        error = np.abs(result - expected)[compared]
    worst = np.max(error / tolerance[compared], initial=0.0)
    assert worst <= 1, f"{what}: {worst:.3g} times the tolerance"


# ---- every combination, by Hypothesis --------------------------------------------------------------------


def lay_out(draw, values):
    """The values in memory of any order, steps, direction and neighbourhood."""
    ndim = values.ndim
    order = draw(st.permutations(range(ndim)), label="order")
    steps = draw(
        st.lists(st.sampled_from([1, 1, 1, 2, 3, -1, -2]), min_size=ndim, max_size=ndim), label="steps"
    )
    pads = draw(st.lists(st.sampled_from([0, 0, 1, 5]), min_size=ndim, max_size=ndim), label="pads")
    shape = [values.shape[d] * abs(steps[d]) + 2 * pads[d] for d in range(ndim)]
    memory = np.zeros([shape[d] for d in order], values.dtype).transpose(np.argsort(order))
    inner = memory[tuple(slice(p, n - p) for p, n in zip(pads, shape, strict=True))]
    view = inner[tuple(slice(None, None, step) for step in steps)]
    view[...] = values
    return view


def data(draw, shape, dtype):
    """Mostly ordinary values, drawn by seed; sometimes Hypothesis's own, or with NaN or infinities among."""
    kind = draw(
        st.sampled_from(["normal", "normal", "offset", "arbitrary", "few", "poisoned"]), label="values"
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    if kind == "arbitrary":  # 1000 / sqrt(eps) is the largest ratio of mean to deviation that is promised
        elements = st.floats(-1000, 1000, width=16)
        return draw(hnp.arrays(np.float32, shape, elements=elements)).astype(dtype)
    values = rng.standard_normal(shape)
    if kind == "offset":
        values += 1000
    if kind == "few":
        values = rng.integers(0, 2, shape).astype(float)
    if kind == "poisoned":
        values[rng.random(shape) < 0.02] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return values.astype(dtype)


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    ndim = draw(st.integers(2, 5), label="ndim")
    groups = draw(st.sampled_from([1, 2, 3, 5, 8]), label="groups")
    size = draw(st.sampled_from([1, 2, 3, 4, 7, 16, 43]), label="channels of a group")
    largest = {2: 0, 3: 150, 4: 17, 5: 6}[ndim]
    spatial = [draw(st.integers(0 if draw(st.integers(0, 30)) == 0 else 1, largest)) for _ in range(ndim - 2)]
    n, c = draw(st.integers(1, 3), label="n"), groups * size
    axis = draw(st.sampled_from([d for d in range(1 - ndim, ndim) if d % ndim]), label="axis")

    def shaped(channels):
        rest = [n, *spatial]
        rest.insert(axis % ndim, channels)
        return tuple(rest)

    parameter = st.sampled_from([None, (c,), (n, c)])
    other = st.sampled_from(DTYPES)
    arguments = {"x": lay_out(draw, data(draw, shaped(c), dtype)), "num_groups": groups, "axis": axis}
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for name in ("weight", "bias"):
        shape = draw(parameter, label=name)
        if shape is not None:
            arguments[name] = lay_out(draw, rng.standard_normal(shape).astype(draw(other)))
    arguments["eps"] = draw(st.sampled_from([1e-5, 1e-5, 1e-2, 1.0]), label="eps")
    arguments["activation"] = draw(st.sampled_from(ACTIVATIONS), label="activation")
    if draw(st.booleans(), label="residual"):
        arguments["residual"] = lay_out(draw, data(draw, shaped(c), draw(other)))
    if draw(st.booleans(), label="mask"):
        part = [length if draw(st.integers(0, 3)) else 1 for length in shaped(1)]
        mask = rng.random(part) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        arguments["mask"] = lay_out(draw, mask)[(0,) * draw(st.integers(0, 1)) if part[0] == 1 else ()]
    if draw(st.integers(0, 3), label="moments") == 0:
        count = rng.integers(0, 5, (n, groups))
        arguments["moments"] = Moments(
            count, 3 * rng.standard_normal(count.shape), count * rng.random(count.shape)
        )
    return arguments


@settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(), st.data())
def test_every_combination_is_that_of_the_reference(arguments, drawn):
    x = arguments["x"]
    before = {name: value.copy() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    y, m = gn_fast.group_norm(**arguments, return_moments=True)
    assert y.dtype == x.dtype
    assert y.strides == np.positive(x).strides
    assert_as_reference(y, arguments)
    if "moments" in arguments:
        assert m is arguments["moments"]
    else:
        only = {name: arguments[name] for name in ("x", "num_groups", "axis", "mask") if name in arguments}
        assert_same_moments(gn_fast.group_moments(**only), m)
        np.testing.assert_array_equal(m.count, reference.group_moments(**only).count)
    for name, value in before.items():
        assert_same_bits(arguments[name], value, name)

    # Into any other array, and on top of an input in any way: the same bits.
    aliasing = drawn.draw(
        st.sampled_from(["fresh", "x", "x moved", "residual", "residual moved"]), label="out"
    )
    name = aliasing.split()[0]
    if name in arguments and arguments[name].dtype == x.dtype:
        base = np.zeros((x.shape[0] + 1, *x.shape[1:]), x.dtype)
        if aliasing.endswith("moved"):
            order = np.argsort([-abs(s) for s in arguments[name].strides], kind="stable")
            base = np.zeros(2 * x.size + 3, x.dtype)
            here = base[: x.size].reshape([x.shape[d] for d in order]).transpose(np.argsort(order))
            shift = drawn.draw(st.integers(0, x.size), label="shift")
            out = base[shift : shift + x.size].reshape(x.shape)
            if name == "x":  # a copy in one piece has the bits of the same walk only if the walk is the same
                here[...] = x
                arguments = arguments | {"x": here}
                y = gn_fast.group_norm(**(arguments | {"x": here.copy(order="K")}))
            else:
                here[...] = arguments[name]
                arguments = arguments | {name: here}
        else:
            out = arguments[name]
    else:
        out = lay_out(drawn.draw, np.full(x.shape, 7, x.dtype))
    assert gn_fast.group_norm(**arguments, out=out) is out
    assert_same_bits(out, y, aliasing)


# ---- activations -----------------------------------------------------------------------------------------


every_activation = pytest.mark.parametrize("activation", ACTIVATIONS[1:])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_level = pytest.mark.parametrize("level", LEVELS)
STANDARD = {"num_groups": 1, "eps": 0.0, "moments": Moments([[1]], [[0.0]], [[1.0]])}  # z is x


def activated(z, activation):
    return gn_fast.group_norm(z.reshape(1, 1, -1), activation=activation, **STANDARD).ravel()


def dy_before(z, activation, dy):
    """dy * act'(z)."""
    x = z.reshape(1, 1, -1)
    dy = np.full_like(x, dy)
    arguments = {"residual": np.zeros_like(x), "activation": activation, **STANDARD}
    return gn_fast.group_norm_backward(dy, x, **arguments)[-1].ravel()


@functools.cache
def every_4001st():
    """float32 there is, and those that matter most."""
    z = np.arange(0, 2**32, 4001, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate([z[np.isfinite(z)], np.linspace(-110, 110, 200_001, dtype=np.float32)])


@functools.cache
def values_and_slopes(activation):
    with np.errstate(all="ignore"):
        return reference._ACTIVATIONS[activation](every_4001st().astype(np.float64))


@every_activation
@every_level
def test_activations_are_within_4_ulp_over_the_whole_range(level, activation):
    """Subnormal results within 4 of their spacings."""
    with gn_fast.use_isa(level):
        y = activated(every_4001st(), activation).astype(np.float64)
    expected, _ = values_and_slopes(activation)
    worst = np.max(np.abs(y - expected) / (4 * spacing(expected, np.float32)))
    assert worst <= 1, f"{4 * worst:.3g} ulp"


@every_activation
@every_level
def test_slopes_are_within_4_ulp_over_the_whole_range(level, activation):
    """At the scale of the slope, or of 1/8 if that is larger."""
    with gn_fast.use_isa(level):
        slope = dy_before(every_4001st(), activation, 1).astype(np.float64)
    _, expected = values_and_slopes(activation)
    worst = np.max(np.abs(slope - expected) / (4 * EPS32 * np.maximum(np.abs(expected), 1 / 8)))
    assert worst <= 1, f"{4 * worst:.3g} ulp"


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@every_level
def test_slopes_of_what_levels_off_keep_their_digits_in_both_tails(level, activation):
    with gn_fast.use_isa(level):
        slope = dy_before(every_4001st(), activation, 1).astype(np.float64)
    _, expected = values_and_slopes(activation)
    worst = np.max(np.abs(slope - expected) / (8 * spacing(expected, np.float32)))
    assert worst <= 1, f"{8 * worst:.3g} ulp"


@every_activation
@every_level
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_activations_of_all_values_of_16_bits_are_rounded_once(dtype, level, activation):
    """After the 4 ulp of float32."""
    z = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # some NaNs are signalling
        z = z[np.isfinite(z.astype(np.float64))]
    with gn_fast.use_isa(level):
        y = activated(z, activation).astype(np.float64)
    expected, _ = reference._ACTIVATIONS[activation](z.astype(np.float64))
    error = 4 * spacing(expected, np.float32)
    worst = np.max(np.abs(y - expected) / (error + 0.5 * spacing(np.abs(expected) + error, dtype)))
    assert worst <= 1, worst


@every_activation
@every_level
def test_activations_of_float64_are_within_4_ulp(level, activation):
    """Against 60 digits, and 400 where 1 + tanh takes away so many."""
    z = np.concatenate([10.0 ** np.arange(-300, 0, 7), 10 ** np.linspace(-5, 2, 150)])
    z = np.concatenate([z, -z, np.linspace(-40, 40, 399)])
    with gn_fast.use_isa(level):
        y = activated(z, activation)
    with mpmath.workdps(400 if activation == "gelu_tanh" else 60):
        exact = [exact_activation(activation, mpmath.mpf(v)) for v in z]
        error = np.array([float(abs(mpmath.mpf(a) - b)) for a, b in zip(y, exact, strict=True)])
    worst = np.max(error / (4 * spacing(np.array(exact, float), np.float64)))
    assert worst <= 1, f"{4 * worst:.3g} ulp"


@every_activation
@every_dtype
@every_level
def test_activations_at_the_ends(level, dtype, activation):
    z = np.array([-np.inf, np.inf, 1e4, -1e4, 6e4, -6e4]).astype(dtype)
    compute = np.result_type(dtype, np.float32) if dtype.kind == "f" else np.float32
    with gn_fast.use_isa(level):
        y = activated(z, activation)
        nan, zero = activated(np.array([np.nan, 0.0]).astype(dtype), activation)
    np.testing.assert_array_equal(y, far_out(activation, z.astype(compute)).astype(dtype))
    assert np.isnan(nan)
    assert zero == (0.5 if activation == "sigmoid" else 0)


@every_activation
@every_level
def test_activations_do_not_overflow(level, activation):
    for dtype, large in ((np.float32, 3e38), (np.float64, 1.7e308)):
        z = np.array([large, -large], dtype)
        with gn_fast.use_isa(level):
            np.testing.assert_array_equal(activated(z, activation), far_out(activation, z))
            slopes = dy_before(z, activation, 3)
        levels_off = activation in ("sigmoid", "tanh")
        below = 3 * dtype(0.01) if activation == "leaky_relu" else 0
        np.testing.assert_allclose(slopes, [0 if levels_off else 3, below], rtol=4 * np.finfo(dtype).eps)


SLOPES = [0.3, -2, -1.0, 0, 1, 7.5, 1e10, 1e-30, -0.0, np.float16(0.1), np.array(0.2), Fraction(1, 3)]


@pytest.mark.parametrize(
    "activation", [*ACTIVATIONS[1:], *(("leaky_relu", s) for s in [*SLOPES, 1e30])], ids=name_of
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@every_level
def test_at_kinks_and_beyond_all_numbers_they_are_pytorchs(level, dtype, activation):
    """But for the limits at -inf and inf, where PyTorch's are mostly NaN."""
    torch = pytest.importorskip("torch")
    points = [-0.0, 0.0, np.nan]
    if activation in ("relu", "hardswish", "sigmoid", "tanh") or isinstance(activation, tuple):
        points += [-3, 3, -4, 4, np.inf]
        for kink in (-3, 0, 3):
            points += [np.nextafter(dtype(kink), dtype(side)) for side in (-9, 9)]
    if activation not in ("silu", "gelu", "gelu_tanh", "mish", "hardswish"):
        points.append(-np.inf)
    exact = activation == "relu" or isinstance(activation, tuple)
    theirs = (activation[0], float(activation[1])) if isinstance(activation, tuple) else activation
    for point, dy in itertools.product(points, [1.5, np.nan, np.inf]):
        # Whole vectors: what PyTorch does to the values behind them differs at NaN.
        leaf = torch.tensor(np.full(64, point, dtype), requires_grad=True)
        expected = activation_of_pytorch(theirs)(leaf)
        expected.backward(torch.full_like(leaf, dy))
        z = np.full(64, point, dtype)
        with gn_fast.use_isa(level):
            y, slopes = activated(z, activation), dy_before(z, activation, dy)
        close = {"rtol": 0, "atol": 0 if exact else 4 * np.finfo(dtype).eps, "err_msg": f"{point} {dy}"}
        np.testing.assert_allclose(y, expected.detach().numpy(), **close)
        np.testing.assert_allclose(slopes, leaf.grad.numpy(), **close)


# ---- slopes of leaky_relu, and swish ---------------------------------------------------------------------


@both_layouts
@every_dtype
@pytest.mark.parametrize("slope", SLOPES, ids=name_of)
def test_leaky_relu_is_a_product_below_0_of_any_slope(slope, dtype, layout):
    """To the last bit, in the compute type; the gradient is that of dy' without an activation."""
    rng = np.random.default_rng(0)
    compute = np.float64 if dtype == np.float64 else np.float32
    below = compute(float(slope))
    for shape in ((2, 6, 31, 37), (2, 6, 5), (3, 6), (1, 2, 300, 230)):
        x, residual, dy = (in_layout(normal(rng, shape, dtype), layout).astype(compute) for _ in range(3))
        weight, bias = normal(rng, (2, shape[1]), compute)  # of float64, short channels would be in float64
        arguments = {"num_groups": 2, "weight": weight, "bias": bias, "residual": residual}
        z = gn_fast.group_norm(x, **arguments)
        with np.errstate(all="ignore"):
            expected, expected_dy = np.where(z > 0, z, below * z), np.where(z > 0, dy, below * dy)
        leaky = {**arguments, "activation": ("leaky_relu", slope)}
        assert_same_bits(gn_fast.group_norm(x, **leaky), expected, f"{shape}")
        for storage in (dtype, compute):
            y = gn_fast.group_norm(x.astype(storage), **leaky)
            assert y.dtype == storage
        dresidual = gn_fast.group_norm_backward(dy, x, **leaky)[3]
        assert_same_bits(dresidual, expected_dy, f"{shape}")
        s = gn_fast.group_gradient_sums(dy, x, **leaky)
        t = gn_fast.group_gradient_sums(expected_dy, x, **arguments)
        results = gn_fast.group_norm_backward(dy, x, **leaky), s.dweight, s.dbias
        expected = gn_fast.group_norm_backward(expected_dy, x, **arguments), t.dweight, t.dbias
        for a, b in zip((*results[0], *results[1:]), (*expected[0], *expected[1:]), strict=True):
            assert_same_bits(a, b, f"{shape}")


@both_layouts
@pytest.mark.parametrize("slope", [1e20, -1e30, 3e38], ids=name_of)
def test_slopes_of_leaky_relu_that_take_sums_out_of_float32(slope, layout):
    """These are in float64, with a z of float64: not to the last bit, but to the bounds."""
    rng = np.random.default_rng(0)
    for shape in ((2, 6, 31, 37), (2, 6, 5), (3, 6)):
        x, dy, residual = (in_layout(normal(rng, shape), layout) for _ in range(3))
        dy /= 1000
        arguments = {"num_groups": 2, "weight": normal(rng, 6), "bias": normal(rng, 6), "residual": residual}
        z = gn_fast.group_norm(x, **arguments)
        expected_dy = np.where(z > 0, dy, np.float32(slope) * dy).astype(np.float64)
        expected = reference.group_norm_backward(expected_dy, x.astype(np.float64), **arguments)
        results = gn_fast.group_norm_backward(dy, x, **arguments, activation=("leaky_relu", slope))
        for result, exact in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, exact, rtol=0, atol=4 * EPS32 * np.abs(exact).max())


@every_dtype
def test_swish_is_silu_and_leaky_relu_has_a_slope_of_a_hundredth(dtype):
    x, dy = normal(np.random.default_rng(0), (2, 2, 6, 50), dtype)
    for same in (("swish", "silu"), ("leaky_relu", ("leaky_relu", 0.01))):
        results = []
        for activation in same:
            arguments = {"num_groups": 2, "weight": np.ones(6), "bias": np.ones(6), "activation": activation}
            y = gn_fast.group_norm(x, **arguments)
            s = gn_fast.group_gradient_sums(dy, x, **arguments)
            results.append((y, s.dweight, s.dbias, *gn_fast.group_norm_backward(dy, x, **arguments)))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b, f"{same}")


# ---- mask ------------------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_the_mask_hides_does_not_count_whatever_it_is(dtype, layout):
    rng = np.random.default_rng(0)
    for shape, groups in (((2, 6, 5), 3), ((2, 6, 60, 61), 2), ((2, 515, 30), 1), ((2, 8), 2)):
        mask = rng.random((2, 1, *shape[2:])) < 0.6
        mask[0] = mask[0] | (mask[0].size == 1)
        x = in_layout(normal(rng, shape, dtype, mean=5), layout)
        m = gn_fast.group_moments(x, groups, mask=mask)
        hidden = np.broadcast_to(~mask, shape)
        for junk in (np.nan, np.inf, 1e4, 0.0):
            x[hidden] = np.array(junk).astype(dtype)
            arguments = {"x": x, "num_groups": groups, "mask": mask}
            assert_same_moments(gn_fast.group_moments(**arguments), m, f"{shape} {junk}")
            assert_as_reference(gn_fast.group_norm(**arguments), arguments, f"{shape} {junk}")


@both_layouts
def test_a_mask_of_all_true_changes_nothing_beyond_the_bound_and_of_all_false_counts_nothing(layout):
    x = in_layout(normal(np.random.default_rng(0), (2, 6, 43, 41), mean=100), layout)
    arguments = {"x": x, "num_groups": 2, "mask": True}
    assert_as_reference(gn_fast.group_norm(**arguments), arguments)
    arguments["mask"] = False
    y, m = gn_fast.group_norm(**arguments, return_moments=True)
    for field in (m.count, m.mean, m.m2):
        np.testing.assert_array_equal(field, 0)
    assert_as_reference(y, arguments)


@both_layouts
def test_one_position_left(layout):
    x = in_layout(normal(np.random.default_rng(0), (1, 4, 7, 9), mean=3), layout)
    mask = np.zeros((1, 1, 7, 9), bool)
    mask[..., 6, 8] = True
    m = gn_fast.group_moments(x, 4, mask=mask)
    np.testing.assert_array_equal(m.count, 1)
    np.testing.assert_array_equal(m.mean, x[..., 6, 8])
    np.testing.assert_array_equal(m.m2, 0)


# ---- moments given, returned and merged ------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_returned_moments_given_back_give_the_result(dtype, layout):
    rng = np.random.default_rng(0)
    x = in_layout(normal(rng, (2, 6, 31, 37), dtype, mean=10), layout)
    weight, bias = normal(rng, (2, 6))
    y, m = gn_fast.group_norm(x, 3, weight, bias, return_moments=True)
    arguments = {"x": x, "num_groups": 3, "weight": weight, "bias": bias}
    assert_as_reference(y, arguments)
    assert_as_reference(gn_fast.group_norm(**arguments, moments=m), arguments)
    frozen = Moments(m.count.astype(">i8"), m.mean[::-1][::-1], np.asfortranarray(m.m2))
    assert_same_bits(
        gn_fast.group_norm(**arguments, moments=frozen), gn_fast.group_norm(**arguments, moments=m)
    )


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mean", [0, 30])
def test_tiles_merged_give_the_result_of_the_whole(dtype, mean, layout):
    x = in_layout(normal(np.random.default_rng(0), (2, 6, 40, 53), dtype, mean=mean), layout)
    cuts = [(slice(i, i + 13), slice(j, j + 20)) for i in range(0, 40, 13) for j in range(0, 53, 20)]
    tiles = [x[:, :, a, b] for a, b in cuts]
    first, *others = (gn_fast.group_moments(tile, 3) for tile in tiles)
    whole = first.merge(*others)
    y = np.empty_like(x)
    for a, b in cuts:
        gn_fast.group_norm(x[:, :, a, b], 3, moments=whole, out=y[:, :, a, b])
    assert_as_reference(y, {"x": x, "num_groups": 3})


def test_a_volume_on_disk_is_normalized_tile_by_tile(tmp_path):
    volume = normal(np.random.default_rng(0), (1, 4, 24, 30, 31), mean=100)
    volume.tofile(tmp_path / "volume.f32")
    x = np.memmap(tmp_path / "volume.f32", np.float32, "r", shape=volume.shape)
    y = np.memmap(tmp_path / "result.f32", np.float32, "w+", shape=volume.shape)
    depths = [slice(d, d + 5) for d in range(0, 24, 5)]
    first, *others = (gn_fast.group_moments(x[:, :, d], 2) for d in depths)
    whole = first.merge(*others)
    for d in depths:
        gn_fast.group_norm(x[:, :, d], 2, moments=whole, activation="silu", out=y[:, :, d])
    assert_as_reference(np.asarray(y), {"x": volume, "num_groups": 2, "activation": "silu"})

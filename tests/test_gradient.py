"""The gradient: against the reference, PyTorch and differences of the forward; every option, and bad input.

The tolerance of dx is 4 ulp of the compute type at the scale of its terms: rstd times the largest of
|weight * dy'|, the mean of |weight * dy'|, and |xhat| + 1/16 times the mean of |weight * dy' * xhat|; that of
dweight and dbias is 4 ulp of the sum of their terms' magnitudes. What the activation adds is propagated:
dy' = dy * act'(z) inherits the error of z (that of test_accuracy.py) times the largest curvature, and that of
act' itself, given at the head of activation.pxi.
"""

import functools
import itertools
import math
import tracemalloc

import ml_dtypes
import mpmath
import numpy as np
import pytest
from helpers import (
    ACTIVATIONS,
    DTYPES,
    EPS32,
    EPS64,
    KINKS,
    LAYOUTS,
    RATIOS,
    activation_of_pytorch,
    assert_same_bits,
    exact_statistics,
    in_layout,
    name_of,
    normal,
    slabs_of,
    spacing,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_errors import BAD, BAD_OUT, SENTINEL, C, H, N, W, X, assert_refused, label
from test_fused import calls, data, lay_out, steps_of_exp
from test_layouts import overlapping_pairs

import gn_fast
from gn_fast import Moments, reference

CURVATURE = 0.8  # the largest |act''|: that of gelu at 0, 2 / sqrt(2 pi); checked below
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def backward(dy, arguments, **more):
    return gn_fast.group_norm_backward(dy, **(arguments | more))


# ---- what is expected, and how far off it may be ---------------------------------------------------------


def seen(values, axis):
    """As float64 of shape (N, C, S)."""
    values = np.moveaxis(np.asarray(values), axis, 1)
    return values.reshape(*values.shape[:2], math.prod(values.shape[2:])).astype(np.float64)


def expected_and_tolerances(dy, x, num_groups, weight=None, bias=None, eps=1e-5, *, axis=1, residual=None,
                            activation=None, mask=None, moments=None):  # fmt: skip
    """Of dx, dweight, dbias and dresidual, before they are rounded; dx and dresidual as (N, C, S)."""
    x = np.asarray(x)
    wide = x.dtype.itemsize == 8 or x.dtype.kind in "iub"
    mask_shape = list(x.shape)
    mask_shape[axis] = 1
    arguments = {
        "x": seen(x, axis),
        "num_groups": num_groups,
        "eps": eps,
        "mask": seen(np.broadcast_to(True if mask is None else mask, mask_shape), axis) != 0,
        "moments": moments,
    }
    weights = {k: np.asarray(v, np.float64) for k, v in (("weight", weight), ("bias", bias)) if v is not None}
    added = {} if residual is None else {"residual": seen(residual, axis)}
    dy = seen(dy, axis)
    with np.errstate(all="ignore"):
        expected = reference.group_norm_backward(dy, **arguments, **weights, **added, activation=activation)
        xhat, m = reference.group_norm(**arguments, return_moments=True)
        z = reference.group_norm(**arguments, **weights, **added)
        _, slope = reference._ACTIVATIONS[activation](z)

        def spread(v):
            return np.repeat(v, x.shape[axis] // num_groups, axis=1)[:, :, None]

        def parameter(name):
            v = np.abs(weights[name])
            return v[None, :, None] if v.ndim == 1 else v[:, :, None]

        def slab_mean(v):
            return spread(slabs_of(v, num_groups).sum(-1) / np.maximum(m.count, 1))

        w = parameter("weight") if weight is not None else np.ones((1, x.shape[axis], 1))
        b = parameter("bias") if bias is not None else 0.0
        r = np.abs(added["residual"]) if added else 0.0
        rstd = spread(m.rstd(eps))
        counted = arguments["mask"] & spread(m.count > 0)
        offset = spread(np.abs(m.mean) * m.rstd(eps))
        ulp = EPS64 if wide else EPS32
        near = np.abs(xhat) + (offset if wide else 0) + 1 / 16

        # The argument of the activation, and dy'.
        z_error = (4 if wide else 2) * ulp * (w * near + b + r)
        z_error = z_error + 4 * EPS64 * (w * (np.abs(xhat) + 1 + offset) + b + r)
        steps = 7 * ulp + 8 * EPS64 * steps_of_exp(z, activation)
        slope_error = 0.0
        for kink in KINKS.get(activation, []):
            slope_error = slope_error + np.where(np.abs(z - kink) <= z_error, 1.0, 0.0)
        if activation == "leaky_relu":
            slope_error = slope_error + ulp * np.abs(slope)  # it is rounded to the compute type
        elif activation not in (None, "relu"):
            slope_error = slope_error + steps * np.maximum(np.abs(slope), 1 / 8) + CURVATURE * z_error
        dz = np.abs(dy * slope)
        dz_error = np.abs(dy) * slope_error + ulp * dz

        # dx: 4 ulp at its terms; what dy' is off, through each of them; and what the reference is off.
        def terms(of):
            a, b = slab_mean(w * of), slab_mean(w * of * near)
            return w * of, np.where(counted, a, 0), np.where(counted, b * near, 0)

        ulps = 4 * ulp + 4 * EPS64
        floor = np.sqrt(slab_mean((w * dz) ** 2)) / 16
        dx_error = rstd * (ulps * (sum(terms(dz)) + floor) + sum(terms(dz_error)))
        sound = slabs_of(np.isfinite(xhat) & np.isfinite(dz), num_groups).all(-1)
        dx_error = np.where(
            spread(sound), dx_error, np.nan
        )  # of the others only whether they are finite is tested
        dx_error = dx_error + (5e-324 if wide else 1.5 * 1.4e-45)  # three roundings of subnormal terms

        def summed(name, values):
            if name not in weights:
                return None
            return values.sum(-1) if weights[name].ndim == 2 else values.sum((0, -1))

        tolerances = (
            dx_error,
            summed("weight", (ulps * dz + dz_error) * near),
            summed("bias", ulps * dz + dz_error),
            dz_error,
        )
    return (*expected, None)[:4], tolerances


def assert_close(result, expected, tolerance, what=""):
    """Within the tolerance and a rounding to the dtype, wherever both are known."""
    largest = float(ml_dtypes.finfo(result.dtype).max)
    values = result.astype(np.float64)
    with np.errstate(all="ignore"):
        if result.dtype == np.float64:
            rounding = EPS64 / 2 * np.abs(expected) + 5e-324
        else:
            magnitude = np.where(np.isfinite(expected), np.abs(expected) + tolerance, 1)
            rounding = 0.5 * spacing(magnitude, result.dtype)
            rounding = rounding + EPS64 * np.abs(expected)
        if result.dtype == DTYPES[1]:
            rounding = rounding + EPS32 * np.abs(expected)  # NumPy rounds to it by way of float32
        tolerance = tolerance + rounding
        beyond = np.isinf(values) & (np.abs(expected) + tolerance >= largest) & (values * expected > 0)
        compared = np.isfinite(expected) & np.isfinite(tolerance) & ~beyond
        error = np.where(compared, np.abs(values - expected), 0.0)
        ratio = np.where(error == 0, 0.0, error / tolerance)
    worst = np.max(ratio, initial=0.0)
    assert worst <= 1, f"{what}: {worst:.3g} times the tolerance"


def assert_as_reference(results, dy, arguments, what=""):
    axis = arguments.get("axis", 1)
    expected, tolerances = expected_and_tolerances(dy, **arguments)
    assert len(results) == (4 if arguments.get("residual") is not None else 3)
    names = ("dx", "dweight", "dbias", "dresidual")
    for name, result, value, tolerance in zip(names, results, expected, tolerances, strict=False):
        assert (result is None) == (value is None), f"{what} {name}"
        if result is not None:
            if name in ("dx", "dresidual"):
                result = np.moveaxis(result, axis, 1).reshape(value.shape)
            assert result.shape == value.shape, f"{what} {name}"
            assert_close(result, value, tolerance, f"{what} {name}")


def assert_same_gradients(results, expected, what=""):
    assert len(results) == len(expected)
    for name, a, b in zip(("dx", "dweight", "dbias", "dresidual"), results, expected, strict=False):
        assert (a is None) == (b is None), f"{what}: {name}"
        if a is not None:
            assert_same_bits(a, b, f"{what}: {name}")


def test_no_activation_bends_more_than_gelu():
    z, step = np.linspace(-20, 20, 400_001), 1e-4
    for activation in ACTIVATIONS[1:]:
        _, slope = reference._ACTIVATIONS[activation](z)
        smooth = np.all([np.abs(z[1:] - kink) > 2 * step for kink in KINKS.get(activation, [99])], axis=0)
        assert np.abs(np.diff(slope) / step)[smooth].max() <= CURVATURE


# ---- every combination, by Hypothesis --------------------------------------------------------------------


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(), st.data())
def test_every_combination_is_that_of_the_reference(arguments, drawn):
    x = arguments["x"]
    dtype = drawn.draw(st.sampled_from(DTYPES), label="dtype of dy")
    dy = lay_out(drawn.draw, data(drawn.draw, x.shape, dtype))
    before = {name: value.copy() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    dy_before = dy.copy()
    results = backward(dy, arguments)
    assert results[0].dtype == x.dtype
    assert results[0].strides == np.positive(x).strides
    for name, result in zip(("weight", "bias", "residual"), results[1:], strict=False):
        if name in arguments:
            like = x if name == "residual" else arguments[name]
            assert (result.dtype, result.shape) == (like.dtype, like.shape)
    assert_as_reference(results, dy, arguments)
    for name, value in before.items():
        assert_same_bits(arguments[name], value, name)
    assert_same_bits(dy, dy_before, "dy")

    # Into any other array, and on top of an input in any way: the same bits.
    aliasing = drawn.draw(st.sampled_from(["fresh", "x", "dy", "dy moved", "residual"]), label="out")
    out = lay_out(drawn.draw, np.full(x.shape, 7, x.dtype))
    if aliasing == "x":
        out = x
    elif aliasing == "residual" and "residual" in arguments and arguments["residual"].dtype == x.dtype:
        out = arguments["residual"]
    elif aliasing == "dy" and dy.dtype == x.dtype:
        out = dy
    elif aliasing == "dy moved" and dy.dtype == x.dtype:
        memory = np.zeros(2 * x.size, x.dtype)
        shift = drawn.draw(st.integers(0, x.size), label="shift")
        memory[: x.size] = dy.ravel()
        dy = memory[: x.size].reshape(x.shape)
        out = memory[shift : shift + x.size].reshape(x.shape)
    again = backward(dy, arguments, out=out)
    assert again[0] is out
    assert_same_gradients(again, results, aliasing)


# ---- accuracy --------------------------------------------------------------------------------------------


def exact_gradient(dy, x, num_groups, weight, eps=1e-5):
    """dx, the scale of its error, dweight and dbias of (N, C, S) inputs of at most 24 bits.

    Independent of the reference: the statistics and all sums are exact (`math.fsum`); right to some 1e-15.
    """
    dy, w = dy.astype(np.float64), weight.astype(np.float64)[None, :, None]
    _, deviation, m2 = exact_statistics(x, num_groups)
    size = deviation.shape[-1]
    rstd = 1 / np.sqrt(m2 / size + eps)[..., None]
    xhat = deviation * rstd
    weighted = slabs_of(dy * w, num_groups)
    a, b = (np.apply_along_axis(math.fsum, -1, v)[..., None] / size for v in (weighted, weighted * xhat))
    dx = rstd * (weighted - a - xhat * b)
    r = np.sqrt(np.mean(weighted**2, axis=-1, keepdims=True))
    terms = rstd * (abs(weighted) + abs(a) + abs(xhat * b) + r / 16)
    products = np.moveaxis(dy * xhat.reshape(x.shape), 1, 0).reshape(x.shape[1], -1)
    dweight, dbias = (
        np.array([math.fsum(row) for row in rows])
        for rows in (products, np.moveaxis(dy, 1, 0).reshape(x.shape[1], -1))
    )
    return dx.reshape(x.shape), terms.reshape(x.shape), dweight, dbias


ACCURACY_SHAPES = [
    ((2, 6, 2550), 2),
    ((3, 64, 49), 8),
    ((2, 640, 1), 5),
    ((2, 24, 3), 3),
    ((1, 2, 66000), 1),
    ((130, 6, 9), 3),
    ((1, 1026, 17), 2),
]


def accuracy_problem(shape, ratio, layout, seed=0):
    rng = np.random.default_rng(seed)
    x = in_layout(normal(rng, shape, mean=ratio), layout)
    dy = in_layout(normal(rng, shape), layout)
    return dy, x, normal(rng, shape[1])


@functools.cache
def exact_solution(shape, num_groups, ratio):
    dy, x, weight = accuracy_problem(shape, ratio, "channels-first")
    return exact_gradient(dy, x, num_groups, weight)


def exact_dx_in_40_digits(dy, x, num_groups, weight, eps=1e-5):
    """Of float64: dx and the scale of its bound, (N, C, S), as mpf objects and float64."""
    with mpmath.workdps(40):
        exactly = np.frompyfunc(lambda v: mpmath.mpf(float(v)), 1, 1)
        values = slabs_of(exactly(x), num_groups)
        weighted = slabs_of(exactly(dy) * exactly(weight)[:, None], num_groups)
        deviation = values - values.mean(-1, keepdims=True)
        root = np.frompyfunc(mpmath.sqrt, 1, 1)
        rstd = 1 / root((deviation * deviation).mean(-1, keepdims=True) + mpmath.mpf(eps))
        xhat = deviation * rstd
        a, b = (v.mean(-1, keepdims=True) for v in (weighted, weighted * xhat))
        dx = rstd * (weighted - a - xhat * b)
        offset = np.maximum(abs(values.mean(-1, keepdims=True) * rstd), 1 / 16)
        r = root((weighted * weighted).mean(-1, keepdims=True))
        scale = rstd * (abs(weighted) + abs(a) + abs(xhat * b) + r * offset)
        return dx.reshape(x.shape), scale.astype(np.float64).reshape(x.shape)


@both_layouts
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("shape", "num_groups"), ACCURACY_SHAPES, ids=name_of)
def test_dweight_and_dbias_are_within_1e_6_at_any_mean(shape, num_groups, ratio, layout):
    dy, x, weight = accuracy_problem(shape, ratio, layout)
    _, dweight, dbias = gn_fast.group_norm_backward(dy, x, num_groups, weight, weight)
    _, _, exact_dweight, exact_dbias = exact_solution(shape, num_groups, ratio)
    for name, result, exact in (("dweight", dweight, exact_dweight), ("dbias", dbias, exact_dbias)):
        error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
        assert error <= 1e-6, f"{name}: {error:.3g}"


@both_layouts
@pytest.mark.parametrize("ratio", RATIOS)
def test_dx_is_within_4_ulp_at_the_scale_of_its_terms_at_any_mean(ratio, layout):
    """Even where a and b have cancelled to far less than their terms; where all are small, at a sixteenth of
    the group's root mean square."""
    worst = {}
    for shape, num_groups in ACCURACY_SHAPES:
        dy, x, weight = accuracy_problem(shape, ratio, layout)
        dx, _, _ = gn_fast.group_norm_backward(dy, x, num_groups, weight)
        exact, scale, _, _ = exact_solution(shape, num_groups, ratio)
        ulps = np.abs(dx - exact) / (EPS32 * scale)
        worst[shape] = round(float(ulps.max()), 2), f"{np.count_nonzero(ulps > 4)} of {ulps.size} above 4"
    assert max(ulps for ulps, _ in worst.values()) <= 4, worst


@both_layouts
def test_dx_of_groups_of_few_values_is_within_4_ulp(layout):
    """Sums of few values have a large share in dx, and few roundings that average out."""
    rng = np.random.default_rng(11)
    for values in (33, 17, 100, 255):
        x, dy = (in_layout(normal(rng, (1, 4000, values)), layout) for _ in range(2))
        dx, _, _ = gn_fast.group_norm_backward(dy, x, 4000)
        exact, scale, _, _ = exact_gradient(dy, x, 4000, np.ones(4000, np.float32))
        assert np.max(np.abs(dx - exact) / (EPS32 * scale)) <= 4, values


@both_layouts
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((1, 48, 36, 37), 48), ((1, 64, 15, 16), 16), ((8, 1030), 5), ((1, 6, 9, 3), 2)],
    ids=name_of,
)
def test_dx_of_float64_is_within_4_ulp(shape, num_groups, ratio, layout):
    """With |mean| * rstd for the sixteenth where that is more, as for y: the mean is rounded to float64."""
    rng = np.random.default_rng(0)
    n, c, *spatial = shape
    x = in_layout(normal(rng, shape, np.float64, mean=ratio), layout)
    dy = in_layout(normal(rng, shape, np.float64), layout)
    weight = normal(rng, c, np.float64)
    dx, _, _ = gn_fast.group_norm_backward(dy, x, num_groups, weight)
    flat = (n, c, math.prod(spatial))
    exact, scale = exact_dx_in_40_digits(dy.reshape(flat), x.reshape(flat), num_groups, weight)
    error = abs(np.frompyfunc(lambda v: mpmath.mpf(float(v)), 1, 1)(dx.reshape(flat)) - exact).astype(
        np.float64
    )
    assert np.max(error / (EPS64 * scale)) <= 4


@both_layouts
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("shape", "num_groups"), ACCURACY_SHAPES, ids=name_of)
def test_dx_is_within_4_ulp_at_the_scale_of_the_terms_of_its_sums(shape, num_groups, ratio, layout):
    for seed in (0, 1):
        dy, x, weight = accuracy_problem(shape, ratio, layout, seed)
        arguments = {"x": x, "num_groups": num_groups, "weight": weight}
        assert_as_reference(backward(dy, arguments), dy, arguments, f"seed {seed}")


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_long_channels_of_every_dtype_and_activation(activation, dtype, layout):
    rng = np.random.default_rng(0)
    for shape, num_groups in (((2, 6, 61, 43), 3), ((1, 2, 260, 257), 1)):
        arguments = {
            "x": in_layout(normal(rng, shape, dtype, mean=3), layout),
            "num_groups": num_groups,
            "weight": normal(rng, shape[1]),
            "bias": normal(rng, (shape[0], shape[1]), dtype),
            "residual": in_layout(normal(rng, shape, dtype), layout),
            "mask": rng.random((shape[0], 1, *shape[2:])) < 0.8,
            "activation": activation,
        }
        dy = in_layout(normal(rng, shape, dtype), layout)
        assert_as_reference(backward(dy, arguments), dy, arguments, f"{shape}")


@both_layouts
@pytest.mark.parametrize("of_x", [1e-30, 1e-15, 1e10, 1e15, 1e30])
@pytest.mark.parametrize("of_dy", [1e-22, 1e-15, 1.0, 1e15, 1e30])
def test_values_of_any_magnitude(of_x, of_dy, layout):
    rng = np.random.default_rng(0)
    x = in_layout((of_x * rng.uniform(-1, 1, (2, 8, 41, 9))).astype(np.float32), layout)
    dy = in_layout((of_dy * rng.standard_normal(x.shape)).astype(np.float32), layout)
    weight = normal(rng, 8)
    for eps in (0.0, 1e-5):
        arguments = {"x": x, "num_groups": 2, "weight": weight, "bias": weight, "eps": eps}
        expected, _ = expected_and_tolerances(dy, **arguments)
        if np.abs(expected[0]).max() < 3e38:
            assert_as_reference(backward(dy, arguments), dy, arguments, f"eps {eps}")


# ---- against differences of the forward, and against PyTorch ---------------------------------------------


def difference_problem(shape, num_groups, layout, activation, masked):
    rng = np.random.default_rng(5)
    n, c, *spatial = shape
    arguments = {
        "x": in_layout(rng.standard_normal(shape), layout),
        "weight": rng.standard_normal(c),
        "bias": rng.standard_normal((n, c)),
        "residual": in_layout(rng.standard_normal(shape), layout),
    }
    options = {"num_groups": num_groups, "eps": 0.3, "activation": activation}
    if masked:
        options["mask"] = rng.random((n, 1, *spatial)) < 0.6
        options["mask"][-1] = False
    return in_layout(rng.standard_normal(shape), layout), arguments, options


@every_activation
@both_layouts
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_it_is_the_slope_of_the_forward_in_every_element(activation, layout, masked):
    dy, arguments, options = difference_problem((3, 4, 3), 2, layout, activation, masked)
    results = backward(dy, arguments | options)
    step = 1e-5
    for (name, base), gradient in zip(arguments.items(), results, strict=True):
        for index in np.ndindex(base.shape):
            loss = []
            for sign in (1, -1):
                moved = base.copy(order="K")
                moved[index] += sign * step
                loss.append((dy * gn_fast.group_norm(**(arguments | options | {name: moved}))).sum())
            # The third derivative, some tens, times step^2 / 6; and the rounding of the difference over step.
            assert gradient[index] == pytest.approx((loss[0] - loss[1]) / (2 * step), abs=2e-8), (name, index)


@every_activation
@both_layouts
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_it_is_the_slope_of_the_forward_along_any_direction(activation, layout, masked):
    rng = np.random.default_rng(6)
    for shape, num_groups in (((2, 12, 17, 19), 3), ((3, 70), 7), ((2, 520, 20), 2)):
        dy, arguments, options = difference_problem(shape, num_groups, layout, activation, masked)
        results = backward(dy, arguments | options)
        for (name, base), gradient in zip(arguments.items(), results, strict=True):
            along, loss = rng.standard_normal(base.shape), []
            for move in (1e-5, -1e-5):
                moved = {name: base + move * along}
                loss.append((dy * gn_fast.group_norm(**(arguments | options | moved))).sum())
            rise = (loss[0] - loss[1]) / 2e-5
            # In units of the norms: the same two errors, the larger sums' roundings among them.
            scale = np.linalg.norm(dy) * np.linalg.norm(along) if base.ndim == dy.ndim else np.abs(dy).sum()
            assert abs((gradient * along).sum() - rise) <= 1e-8 * scale, (name, shape)


# The sample and reference inputs of PyTorch's operator tests; the second has eps = -0.5 there, refused here.
PYTORCH = [
    ((1, 6, 3), 2, 0.5),
    ((2, 6, 3), 2, 0.5),
    ((1, 3), 1, 1e-5),
    ((0, 2), 1, 1e-5),
    ((5, 5, 5), 1, 0.5),
    ((1, 2), 1, 1e-5),
    ((20, 6, 10, 10), 3, 1e-5),
    ((20, 6, 10, 10), 6, 1e-5),
    ((20, 6, 10, 10), 1, 1e-5),
]


@every_activation
@both_layouts
@pytest.mark.parametrize(("shape", "num_groups", "eps"), PYTORCH)
def test_it_is_the_automatic_gradient_of_pytorch(shape, num_groups, eps, layout, activation):
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    act = activation_of_pytorch(activation)
    rng = np.random.default_rng(0)
    x, residual, dy = (in_layout(rng.uniform(-9, 9, shape), layout) for _ in range(3))
    weight, bias = rng.uniform(-9, 9, (2, shape[1]))
    for w, b, r in (
        (weight, bias, residual),
        (None, bias, None),
        (weight, None, residual),
        (None, None, None),
    ):
        # A weight of 1 and a bias of 0 for none, without which some of its gradients are not defined.
        leaves = [
            None if v is None else torch.tensor(v, requires_grad=True)
            for v in (x, np.ones(shape[1]) if w is None else w, np.zeros(shape[1]) if b is None else b, r)
        ]
        z = f.group_norm(leaves[0], num_groups, leaves[1], leaves[2], eps)
        act(z if r is None else z + leaves[3]).backward(torch.tensor(dy))
        arguments = {"x": x, "num_groups": num_groups, "weight": w, "bias": b, "eps": eps, "residual": r,
                     "activation": activation}  # fmt: skip
        results = backward(dy, arguments)
        _, tolerances = expected_and_tolerances(dy, **arguments)
        for result, leaf, tolerance in zip((*results, None)[:4], leaves, tolerances, strict=True):
            if result is not None:
                theirs = leaf.grad.numpy()
                assert_close(result, theirs, 2 * np.reshape(tolerance, theirs.shape))  # each its own
        if activation is None and r is None and shape[0]:
            assert_as_reference(results, dy, arguments)


# ---- results: which, and of what kind --------------------------------------------------------------------


def test_what_is_absent_has_no_gradient():
    rng = np.random.default_rng(0)
    x, dy = normal(rng, (2, 2, 6, 5))
    weight = normal(rng, 6)
    for w, b in itertools.product((None, weight), repeat=2):
        dx, dweight, dbias = gn_fast.group_norm_backward(dy, x, 2, w, b)
        assert dx.shape == x.shape
        assert (dweight is None, dbias is None) == (w is None, b is None)
    *_, dresidual = gn_fast.group_norm_backward(dy, x, 2, residual=x)
    assert_same_bits(dresidual, dy)


@every_dtype
@pytest.mark.parametrize("of_weight", DTYPES, ids=name_of)
@pytest.mark.parametrize("of_bias", DTYPES, ids=name_of)
def test_gradients_have_the_dtype_and_shape_of_their_argument(dtype, of_weight, of_bias):
    rng = np.random.default_rng(0)
    x, dy = normal(rng, (2, 3, 6, 17))
    for shapes in itertools.product(((6,), (3, 6)), repeat=2):
        arguments = {
            "x": x.astype(dtype),
            "num_groups": 2,
            "weight": normal(rng, shapes[0], of_weight),
            "bias": normal(rng, shapes[1], of_bias),
            "residual": normal(rng, x.shape, of_bias),
        }
        results = backward(dy, arguments)
        assert [g.dtype for g in results] == [dtype, of_weight, of_bias, dtype]
        assert [g.shape for g in results] == [x.shape, *shapes, x.shape]
        assert_as_reference(results, dy, arguments)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, bool])
def test_integers_are_taken_as_float64(kind):
    rng = np.random.default_rng(0)
    x, dy, weight = (rng.integers(0, 2, shape).astype(kind) for shape in ((3, 6, 7), (3, 6, 7), 6))
    results = gn_fast.group_norm_backward(dy, x, 2, weight, weight, residual=x)
    assert all(g.dtype == np.float64 for g in results)
    wide = [v.astype(np.float64) for v in (dy, x, weight)]
    expected = gn_fast.group_norm_backward(wide[0], wide[1], 2, wide[2], wide[2], residual=wide[1])
    assert_same_gradients(results, expected)
    lists = [v.tolist() for v in wide]
    results = gn_fast.group_norm_backward(lists[0], lists[1], 2, lists[2], lists[2], residual=lists[1])
    assert_same_gradients(results, expected, "lists")


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2), (0, 3, 1, 2)], ids=str
)
def test_dx_and_dresidual_lie_in_memory_as_x_does(order):
    rng = np.random.default_rng(0)
    shape = (2, 6, 5, 7)
    x = normal(rng, [shape[d] for d in order]).transpose(np.argsort(order))
    dy, residual = normal(rng, (2, *shape))
    arguments = {"x": x, "num_groups": 3, "residual": residual}
    results = backward(dy, arguments)
    assert results[0].strides == results[3].strides == x.strides
    assert_as_reference(results, dy, arguments)


@every_dtype
@both_layouts
def test_dy_of_any_float_dtype_and_layout_is_converted(dtype, layout):
    rng = np.random.default_rng(0)
    x = in_layout(normal(rng, (2, 6, 21, 23), dtype), layout)
    plain = rng.integers(-128, 128, x.shape) / 32  # exact in every dtype
    arguments = {"x": x, "num_groups": 2, "activation": "silu"}
    expected = backward(in_layout(plain.astype(dtype), layout), arguments)
    for other, order in itertools.product(DTYPES, LAYOUTS):
        results = backward(in_layout(plain.astype(other), order), arguments)
        assert_same_gradients(results, expected, f"{other} {order}")
    assert_same_gradients(backward(plain.astype(">f4"), arguments), expected, "bytes swapped")


@both_layouts
def test_the_channels_may_be_at_any_axis(layout):
    rng = np.random.default_rng(0)
    dy, x = (in_layout(normal(rng, (2, 6, 9, 11)), layout) for _ in range(2))
    for axis in (1, 2, 3, -1, -2, -3):
        x_there, dy_there = (np.moveaxis(v, 1, axis) for v in (x, dy))
        arguments = {"x": x_there, "num_groups": 3, "axis": axis, "weight": normal(rng, 6)}
        assert_as_reference(backward(dy_there, arguments), dy_there, arguments)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (2, 4, 3, 0), (2, 0), (2, 0, 3), (0, 0, 0)])
@pytest.mark.parametrize("axis", [1, -1])
def test_empty_input_gives_empty_dx_and_sums_of_zero(shape, axis):
    n, c = shape[:2]
    x = np.moveaxis(np.zeros(shape, np.float32), 1, axis)
    out = np.empty_like(x)
    for w, b in itertools.product(((c,), (n, c)), repeat=2):
        results = gn_fast.group_norm_backward(
            x, x, 2, np.ones(w), np.ones(b, np.float16), axis=axis, residual=x, activation="mish", out=out
        )
        assert results[0] is out
        assert results[3].shape == x.shape
        for result, shape_of_it, dtype in ((results[1], w, np.float64), (results[2], b, np.float16)):
            assert result.dtype == dtype
            np.testing.assert_array_equal(result, np.zeros(shape_of_it))


def test_gradients_of_a_subclass_of_ndarray_are_of_it_where_y_is():
    class Labelled(np.ndarray):
        pass

    x = normal(np.random.default_rng(0), (2, 4, 5)).view(Labelled)
    assert type(gn_fast.group_norm(x, 2)) is Labelled
    dx, _, _, dresidual = gn_fast.group_norm_backward(x, x, 2, residual=x)
    assert type(dx) is type(dresidual) is Labelled


def test_sums_beyond_their_dtype_are_infinite_and_nothing_is_raised():
    """Not even where the caller makes errors of NumPy's warnings: `out` has been written by then."""
    x = normal(np.random.default_rng(0), (1, 2, 70000), np.float16)
    dy = np.ones_like(x)
    weight = np.ones(2, np.float16)
    with np.errstate(all="raise"):
        _, _, dbias = gn_fast.group_norm_backward(dy, x, 2, weight, weight)
        np.testing.assert_array_equal(dbias, np.inf)
        _, _, dbias = gn_fast.group_norm_backward(dy * np.float16("nan"), x, 2, weight, weight)
        np.testing.assert_array_equal(dbias, np.nan)


# ---- statistics: a slab of one value, masks, moments -----------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (2, 4, 1, 1)], ids=name_of)
def test_a_slab_of_one_value_passes_nothing_to_x(shape, dtype):
    rng = np.random.default_rng(0)
    dy, x = normal(rng, (2, *shape), dtype)
    weight = normal(rng, 4, dtype)
    arguments = {"x": x, "num_groups": 4, "weight": weight, "bias": weight}
    results = backward(dy, arguments)
    assert_as_reference(results, dy, arguments)
    np.testing.assert_array_equal(results[1], 0)


@both_layouts
@every_dtype
def test_a_constant_slab(dtype, layout):
    dy = in_layout(normal(np.random.default_rng(0), (2, 6, 40, 3), dtype), layout)
    arguments = {"x": in_layout(np.full(dy.shape, 7, dtype), layout), "num_groups": 2, "weight": np.ones(6)}
    results = backward(dy, arguments)
    assert_as_reference(results, dy, arguments)
    np.testing.assert_array_equal(results[1], 0)
    assert np.isnan(backward(dy, arguments, eps=0.0)[0].astype(np.float64)).all()


@every_activation
@both_layouts
def test_a_masked_position_moves_no_statistics_but_has_its_own_output(layout, activation):
    """One masked position at a time has dy: dx there is that of fixed statistics; the others move these."""
    rng = np.random.default_rng(0)
    x = in_layout(normal(rng, (1, 4, 5, 7), np.float64), layout)
    mask = rng.random((1, 1, 5, 7)) < 0.6
    m = gn_fast.group_moments(x, 2, mask=mask)
    hidden = np.flatnonzero(~mask.ravel())
    for position in hidden[:3]:
        dy = np.zeros((1, 4, 35))
        dy[0, 1, position] = 1.5
        dy = in_layout(dy.reshape(x.shape), layout)
        arguments = {"x": x, "num_groups": 2, "mask": mask, "activation": activation}
        results = backward(dy, arguments)
        assert_as_reference(results, dy, arguments)
        dx = results[0].reshape(4, 35)
        z = gn_fast.group_norm(x, 2, mask=mask).reshape(4, 35)
        _, slope = reference._ACTIVATIONS[activation](z[1, position])
        assert dx[1, position] == pytest.approx(1.5 * slope * m.rstd(1e-5)[0, 0], rel=1e-13)
        others = np.setdiff1d(hidden, position)
        np.testing.assert_array_equal(dx[:, others], 0)
        np.testing.assert_array_equal(dx[2:], 0)
        assert slope == 0 or np.all(dx[:2, mask.ravel()] != 0)


@both_layouts
@every_dtype
def test_a_slab_with_nothing_counted_has_constant_statistics(dtype, layout):
    rng = np.random.default_rng(0)
    for shape in ((2, 6, 5, 7), (2, 6, 50, 51), (2, 6, 3)):
        dy, x = (in_layout(normal(rng, shape, dtype), layout) for _ in range(2))
        mask = np.ones((2, 1, *shape[2:]), bool)
        mask[1] = False
        arguments = {"x": x, "num_groups": 2, "mask": mask, "weight": normal(rng, 6, dtype), "eps": 0.25}
        results = backward(dy, arguments)
        assert_as_reference(results, dy, arguments)
        scale = 2 * arguments["weight"].astype(np.float32).reshape(6, *(1,) * (len(shape) - 2))
        if dtype != np.float64:
            assert_same_bits(results[0][1], (dy[1].astype(np.float32) * scale).astype(dtype))
        empty = Moments(np.zeros((2, 2), int), np.zeros((2, 2)), np.zeros((2, 2)))
        given = arguments | {"mask": None, "moments": empty}
        assert_as_reference(backward(dy, given), dy, given, "moments of nothing")


@every_dtype
@both_layouts
@every_activation
def test_moments_of_the_forward_give_the_same_bits(activation, layout, dtype):
    rng = np.random.default_rng(0)
    for shape, num_groups in (((2, 6, 43, 41), 3), ((3, 8, 5), 2), ((2, 1026, 3), 2), ((1, 2, 260, 257), 1)):
        arguments = {
            "x": in_layout(normal(rng, shape, dtype, mean=9), layout),
            "num_groups": num_groups,
            "weight": normal(rng, shape[1], dtype),
            "bias": normal(rng, shape[:2], dtype),
            "mask": rng.random((shape[0], 1, *shape[2:])) < 0.9,
            "activation": activation,
        }
        dy = in_layout(normal(rng, shape, dtype), layout)
        _, m = gn_fast.group_norm(**arguments, return_moments=True)
        assert_same_gradients(backward(dy, arguments, moments=m), backward(dy, arguments), f"{shape}")


@both_layouts
@every_activation
def test_tiles_give_the_gradient_of_their_own_outputs(activation, layout):
    rng = np.random.default_rng(0)
    shape, cuts = (2, 6, 30, 23), (slice(0, 11), slice(11, 30))
    x = in_layout(normal(rng, shape, mean=5), layout)
    weight, bias = normal(rng, (2, 6))
    m = gn_fast.group_moments(x, 3)
    arguments = {"x": x, "num_groups": 3, "weight": weight, "bias": bias, "activation": activation}
    for cut in cuts:
        dy = np.zeros_like(x)
        dy[:, :, cut] = normal(rng, dy[:, :, cut].shape)
        expected, tolerances = expected_and_tolerances(dy, **arguments)
        dx, dweight, dbias = backward(dy[:, :, cut], arguments, x=x[:, :, cut], moments=m)
        whole = expected[0].reshape(shape)[:, :, cut], *expected[1:3]
        allowed = tolerances[0].reshape(shape)[:, :, cut], *tolerances[1:3]
        for result, value, tolerance in zip((dx, dweight, dbias), whole, allowed, strict=True):
            assert_close(result, value, tolerance)


# ---- NaN and infinity ------------------------------------------------------------------------------------

POISON = [np.nan, np.inf, -np.inf]


def assert_finite_alike(results, dy, arguments, what):
    expected, _ = expected_and_tolerances(dy, **arguments)
    for name, result, value in zip(("dx", "dweight", "dbias", "dresidual"), results, expected, strict=False):
        if result is not None:
            finite = np.isfinite(result.astype(np.float64)).reshape(value.shape)
            differ = np.argwhere(finite != np.isfinite(value))
            assert not len(differ), f"{what}: {name} is {'' if finite[tuple(differ[0])] else 'not '}finite " \
                f"at {differ[0]} and {len(differ) - 1} more"  # fmt: skip


@every_activation
@both_layouts
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("where", ["x", "dy", "residual"])
def test_poison_stays_in_its_sample_and_group(where, poison, layout, activation):
    rng = np.random.default_rng(0)
    for shape in ((3, 6, 5, 4), (3, 6, 41, 40), (3, 6, 3, 1)):
        arrays = {name: in_layout(normal(rng, shape), layout) for name in ("x", "dy", "residual")}
        weight, bias = normal(rng, (3, 6)), normal(rng, 6)
        arguments = {"num_groups": 3, "weight": weight, "bias": bias, "activation": activation}
        dx, dweight, _, dresidual = gn_fast.group_norm_backward(**arrays, **arguments)
        arrays[where][1, 3, 2, 0] = poison
        results = gn_fast.group_norm_backward(**arrays, **arguments)
        own = np.zeros(shape, bool)
        own[1, 2:4] = True
        assert_same_bits(results[0][~own], dx[~own], f"{shape} dx")
        assert_same_bits(results[3][~own], dresidual[~own], f"{shape} dresidual")
        assert_same_bits(results[1][~own[:, :, 0, 0]], dweight[~own[:, :, 0, 0]], f"{shape} dweight")


@every_activation
@both_layouts
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("where", ["x", "dy", "residual", "weight"])
def test_what_poison_reaches_is_that_of_the_reference(where, poison, layout, activation):
    rng = np.random.default_rng(0)
    for shape in ((3, 6, 5, 4), (3, 6, 41, 40), (3, 6, 3, 1)):
        dy = in_layout(normal(rng, shape), layout)
        arguments = {
            "x": in_layout(normal(rng, shape), layout),
            "num_groups": 3,
            "weight": normal(rng, 6),
            "bias": normal(rng, 6),
            "residual": in_layout(normal(rng, shape), layout),
            "activation": activation,
        }
        array = dy if where == "dy" else arguments[where]
        array[3 if where == "weight" else (1, 3, 2, 0)] = poison
        assert_finite_alike(backward(dy, arguments), dy, arguments, f"{shape}")


@both_layouts
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("left", [0.0, 0.5], ids=["all masked", "half masked"])
def test_poison_in_the_padding_reaches_what_it_does_in_the_reference(left, poison, layout):
    """The statistics do not know it; the sums over all outputs do, unless the slab counted nothing."""
    rng = np.random.default_rng(0)
    for shape in ((2, 6, 5, 4), (2, 6, 41, 40)):
        dy, x = (in_layout(normal(rng, shape), layout) for _ in range(2))
        mask = rng.random((2, 1, *shape[2:])) < left
        mask[0, 0, 1, 2] = False
        x[0, 3, 1, 2] = poison
        arguments = {"x": x, "num_groups": 2, "weight": normal(rng, 6), "bias": normal(rng, 6), "mask": mask}
        assert_finite_alike(backward(dy, arguments), dy, arguments, f"{shape}")


# ---- where dx goes ---------------------------------------------------------------------------------------


def alias_problem(layout, dtype=np.float32, shape=(2, 6, 43, 31)):
    rng = np.random.default_rng(0)
    dy, x, residual = (in_layout(normal(rng, shape, dtype), layout) for _ in range(3))
    weight, bias = normal(rng, (2, 6), dtype)
    mask = rng.random((2, 1, *shape[2:])) < 0.7
    return dy, {"x": x, "num_groups": 2, "weight": weight, "bias": bias, "residual": residual, "mask": mask,
                "activation": "gelu"}  # fmt: skip


@every_dtype
@both_layouts
def test_one_array_may_be_dy_and_x_and_residual_and_out(layout, dtype):
    _, arguments = alias_problem(layout, dtype)
    for names in itertools.product((False, True), repeat=2):
        one = arguments["x"].copy(order="K")
        same = {name: one for name, use in zip(("x", "residual"), names, strict=True) if use}
        expected = backward(one.copy(order="K"), arguments | {name: one.copy(order="K") for name in same})
        assert_same_gradients(backward(one, arguments | same, out=one), expected, str(names))
        assert not np.array_equal(one, arguments["x"])


@both_layouts
def test_out_may_overlap_the_other_inputs_in_any_way(layout):
    dy, arguments = alias_problem(layout)
    expected = backward(dy, arguments)
    for name in ("weight", "bias", "residual"):
        memory = np.zeros(2 * dy.size, np.float32)
        out = memory[: dy.size].reshape(dy.shape)
        value = memory[10 : 10 + arguments[name].size].reshape(arguments[name].shape)
        value[...] = arguments[name]
        assert_same_gradients(backward(dy, arguments | {name: value}, out=out), expected, name)
    memory = np.zeros(dy.size, np.float32)
    mask = memory.view(np.bool_)[7 : 7 + arguments["mask"].size].reshape(arguments["mask"].shape)
    mask[...] = arguments["mask"]
    out = memory.reshape(dy.shape)
    assert_same_gradients(backward(dy, arguments | {"mask": mask}, out=out), expected, "mask")
    m = gn_fast.group_moments(arguments["x"], 2, mask=arguments["mask"])
    memory = np.zeros(dy.size, np.float32)
    fields = [
        memory[i : i + 8].view(dtype).reshape(2, 2) for i, dtype in ((16, "i8"), (32, "f8"), (48, "f8"))
    ]
    for field, value in zip(fields, (m.count, m.mean, m.m2), strict=True):
        field[...] = value
    out = memory.reshape(dy.shape)
    assert_same_gradients(backward(dy, arguments, moments=Moments(*fields), out=out), expected, "moments")


@both_layouts
def test_dy_that_overlaps_out_in_part_behaves_as_if_copied(layout):
    dy, arguments = alias_problem(layout)
    expected = backward(dy, arguments)
    for shift in (1, 31, 1000, -1, -31):
        memory = np.zeros(dy.size + 1000, np.float32)
        start = max(0, -shift)
        moved = memory[start : start + dy.size].reshape(dy.shape)
        moved[...] = dy
        out = memory[start + shift : start + shift + dy.size].reshape(dy.shape)
        assert_same_gradients(backward(moved, arguments, out=out), expected, f"by {shift}")
    memory = dy.copy(order="C")
    assert_same_gradients(backward(memory, arguments, out=memory[:, :, ::-1]), expected, "backwards")


@every_dtype
@both_layouts
def test_x_that_overlaps_out_in_part_behaves_as_if_copied(layout, dtype):
    """Whether dy is apart, lies there too, or is out itself."""
    rng = np.random.default_rng(0)
    for what, view, out in overlapping_pairs(dtype):
        last = abs(view.strides[1]) < abs(view.strides[3])
        if (layout == "channels-last") != last:
            continue  # another layout of x, other bits
        x, dy, residual = (in_layout(normal(rng, view.shape, dtype), layout) for _ in range(3))
        weight, bias = normal(rng, (2, 4))
        options = {"weight": weight, "bias": bias, "residual": residual, "activation": "silu"}
        for more in ({}, options):
            for place in ("apart", "x", "out"):
                view[...] = x
                out_dy = {"apart": dy, "x": view, "out": out}[place]
                arguments = np.array(out_dy), np.array(view, order="K")  # of what lies there
                expected = gn_fast.group_norm_backward(*arguments, 2, **more)
                result = gn_fast.group_norm_backward(out_dy, view, 2, **more, out=out)
                assert result[0] is out
                assert_same_gradients(result, expected, f"{what}, dy {place}")


# ---- bad input -------------------------------------------------------------------------------------------

DY = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)

BAD_DY = [
    ("dy", np.ones((N, C, H, W + 1), np.float32), ValueError, "(2, 6, 3, 6)"),
    ("dy", np.ones((1, C, H, W), np.float32), ValueError, "(1, 6, 3, 5)"),
    ("dy", np.ones((C, H, W), np.float32), ValueError, "(6, 3, 5)"),
    ("dy", np.ones((N, C, W, H), np.float32), ValueError, "(2, 6, 5, 3)"),
    ("dy", 1.0, ValueError, "()"),
    ("dy", [], ValueError, "(0,)"),
    ("dy", X.astype(complex), TypeError, "complex128"),
    ("dy", X.astype(object), TypeError, "object"),
    ("dy", X.astype(np.longdouble), TypeError, np.dtype(np.longdouble).name),
    ("dy", X.astype("U8"), TypeError, "U8"),
    ("dy", None, TypeError, "object"),
    ("dy", [[1.0, 2.0], [3.0]], (TypeError, ValueError), "inhomogeneous"),
    ("dy", np.ma.masked_array(X, X > 0), TypeError, "masked"),
]


@pytest.mark.parametrize(("name", "value", "error", "was"), BAD + BAD_DY, ids=label)
def test_bad_input_is_refused_and_nothing_written(name, value, error, was):
    out = np.full_like(X, SENTINEL)
    arguments = {"dy": DY, "x": X, "num_groups": 2, "out": out} | {name: value}
    assert_refused(lambda: gn_fast.group_norm_backward(**arguments), name, error, was)
    assert (out == SENTINEL).all()


@pytest.mark.parametrize(("name", "value", "error", "was"), BAD + BAD_DY, ids=label)
@pytest.mark.parametrize("place", ["x", "dy"])
def test_in_place_nothing_is_written_by_a_call_that_raises(place, name, value, error, was):
    arguments = {"dy": DY.copy(), "x": X.copy(), "num_groups": 2}
    out = arguments[place]
    with pytest.raises(error):
        gn_fast.group_norm_backward(**(arguments | {name: value}), out=out)
    np.testing.assert_array_equal(arguments["dy"], DY)
    np.testing.assert_array_equal(arguments["x"], X)


@pytest.mark.parametrize(("out", "error", "was"), BAD_OUT, ids=label)
def test_an_unfit_out_is_refused(out, error, was):
    before = np.array(out, copy=True)
    assert_refused(lambda: gn_fast.group_norm_backward(DY, X, 2, out=out), "out", error, was)
    np.testing.assert_array_equal(np.asarray(out), before)


def test_an_out_between_the_values_of_x_is_taken():
    memory = np.zeros((*X.shape[:3], 2 * W), np.float32)
    memory[..., ::2] = X
    dx, _, _ = gn_fast.group_norm_backward(DY, memory[..., ::2], 2, out=memory[..., 1::2])
    assert_same_bits(dx, gn_fast.group_norm_backward(DY, X, 2)[0])
    np.testing.assert_array_equal(memory[..., ::2], X)


def test_an_integer_x_wants_a_float64_out():
    x = np.arange(24).reshape(2, 4, 3)
    assert_refused(
        lambda: gn_fast.group_norm_backward(x, x, 2, out=np.zeros(x.shape, int)), "out", TypeError, "int64"
    )
    out = np.zeros(x.shape)
    assert gn_fast.group_norm_backward(x, x, 2, out=out)[0] is out


def test_no_memory_is_a_memory_error():
    x = np.broadcast_to(np.float32(1), (1, 2, 2**59))
    with pytest.raises(MemoryError):
        gn_fast.group_norm_backward(x, x, 1)


# ---- memory ----------------------------------------------------------------------------------------------


def peak(shape, layout, threads=1, per_sample=False):
    """Of a call with out=, in bytes; each group has 4 channels."""
    rng = np.random.default_rng(0)
    x, dy, out = (in_layout(normal(rng, shape), layout) for _ in range(3))
    weight = np.ones(shape[:2] if per_sample else shape[1], np.float32)
    arguments = {"x": x, "num_groups": shape[1] // 4, "weight": weight, "bias": weight, "activation": "silu"}
    with gn_fast.num_threads(threads):
        backward(dy, arguments, out=out)
        tracemalloc.start()
        try:
            results = backward(dy, arguments, out=out)
            assert results[0] is out
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


FIXED = 8192 + 3 * (3 << 15)  # bytes of Python objects, and tiles of three threads


def batch(channels, groups):
    """What is found of a thread's batch of units, which fits a quarter of its cache, and one unit more."""
    return gn_fast.show_config("dicts")["caches"]["level 2"] // 4 + 2 * 8 * (2 * channels + 6 * groups)


@both_layouts
def test_memory_does_not_grow_with_samples_times_threads(three_processors, layout):
    n, c, groups = 512, 64, 16
    one, three = (peak((n, c, 4, 5), layout, threads) for threads in (1, 3))
    assert three - one <= 2 * batch(c, groups) + FIXED
    assert one <= 2 * 64 * c * 8 + batch(c, groups) + 2 * 4 * c + FIXED  # and 64 rows of each sum
    assert one < n * c * 8


@both_layouts
def test_memory_does_not_grow_with_the_positions(three_processors, layout):
    """But for what the chunks of one unit found, when the threads share it: at most 256 of them; and for dy' of the
    units at work, with an activation: at most half of the last level cache."""
    c, groups = 64, 16
    kept = gn_fast.show_config("dicts")["caches"]["last level"] // 2
    small, large, larger = (peak((2, c, s, 8), layout) for s in (1, 1000, 40_000))
    assert max(large, larger) <= small + FIXED + kept
    chunks = 256 * 8 * (2 * c + 6 * groups) + 2 * 2 * c * 8
    shared, more_shared = (peak((1, c, s, 8), layout, threads=3) for s in (1000, 40_000))
    assert shared <= chunks + FIXED + c * 1000 * 8 * 4
    assert more_shared <= chunks + FIXED + kept


@both_layouts
def test_parameters_of_each_sample_cost_a_row_of_each_sum(three_processors, layout):
    n, c, groups = 200, 64, 16
    rows = n * c * (8 + 4) * 2  # dweight and dbias, in float64 and as they are returned
    for threads in (1, 3):
        found = threads * batch(c, groups)
        assert peak((n, c, 4, 5), layout, threads, per_sample=True) <= rows + found + FIXED


@pytest.mark.parametrize(
    ("dy", "scale", "weight", "eps"),
    [
        (1e-30, 1e-20, 1e-20, 0),
        (1e30, 1e20, 1e10, 1e-5),
        (1e35, 1e5, 1e4, 1e-5),
        (3e38, 1e3, 1, 1e-5),
        (1e30, 1e38, 1e-3, 0),
        (1e-24, 1e10, 1, 1e-5),
        (1e-20, 1e-9, 1e30, 1e-20),
        (2.0**60, 2.0**37, 2.0**-98, 1e-5),
    ],
)
def test_no_factor_of_dx_leaves_the_range_of_float32_before_dx_does(dy, scale, weight, eps):
    x = np.array([[1, 2, 3, 3.3]]) * scale
    arrays = np.array([[dy, 0, 0, 0]]), x, np.full(4, weight)
    dy64, x64, w64 = arrays
    exact = gn_fast.reference.group_norm_backward(dy64, x64, 1, w64, eps=eps)[0]
    dy32, x32, w32 = (a.astype(np.float32) for a in arrays)
    dx = gn_fast.group_norm_backward(dy32, x32, 1, w32, eps=eps)[0]
    # The inputs are rounded, each by up to 6e-8, and dx cancels by a factor of up to 10.
    np.testing.assert_allclose(dx, exact, rtol=2e-6)


@both_layouts
def test_weights_whose_product_with_the_sums_is_beyond_float64(layout):
    rng = np.random.default_rng(0)
    x, dy = (in_layout(normal(rng, (1, 2, 300, 2), np.float64), layout) for _ in range(2))
    x, weight = x * 1e150, np.full(2, 1e200)
    dx = gn_fast.group_norm_backward(dy, x, 1, weight)[0]
    exact = gn_fast.reference.group_norm_backward(dy, x / 1e150, 1, np.ones(2), eps=0)[0]
    np.testing.assert_allclose(dx / 1e50, exact, rtol=1e-9, atol=1e-9)


@both_layouts
@pytest.mark.parametrize("weight", [np.inf, 3e38, np.nan])
def test_a_group_beyond_range_leaves_the_bits_of_the_others(weight, layout):
    x, dy = normal(np.random.default_rng(0), (2, 2, 4, 30, 9))
    weights = np.ones((2, 4), np.float32)
    weights[1, :2] = weight
    x, dy = in_layout(x, layout), in_layout(dy, layout)
    ones = gn_fast.group_norm_backward(dy, x, 2, np.ones(4, np.float32))[0]
    dx = gn_fast.group_norm_backward(dy, x, 2, weights)[0]
    assert_same_bits(dx[:1], ones[:1])
    assert_same_bits(dx[:, 2:], ones[:, 2:])


def test_a_signalling_nan_of_dy_is_a_nan_of_dresidual():
    """No arithmetic makes it quiet on the way."""
    x = normal(np.random.default_rng(0), (1, 2, 64), ml_dtypes.bfloat16)
    dy = np.ones(x.shape, np.float32)
    dy.view(np.uint32)[0, 0, 3] = 0x7F800001
    for activation in (None, "relu"):
        dresidual = gn_fast.group_norm_backward(dy, x, 1, residual=x + 100, activation=activation)[3]
        assert np.isnan(dresidual[0, 0, 3])

"""The oracle is right: the reference against exact arithmetic, certified data and differences.

The compiled functions are compared with the reference elsewhere. Here the reference itself is
held against the definition, written out once more in numbers of 60 digits, element by element.
"""

import itertools
import math
import warnings
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from helpers import activation_of_pytorch
from mpmath import mpf

from gn_fast import reference
from gn_fast.moments import Moments

ACTIVATIONS = [
    None, "relu", "leaky_relu", "hardswish", "silu", "gelu", "gelu_tanh", "mish", "sigmoid", "tanh",
]  # fmt: skip
ULP = np.finfo(np.float64).eps

mpmath.mp.dps = 60


# ---- the definition in 60 digits -----------------------------------------------------------------


def exact_activation(name, z):
    if name is None:
        return z
    if name == "relu":
        return max(z, mpf(0))
    if name == "leaky_relu":
        return z if z > 0 else mpf(0.01) * z
    if name == "hardswish":
        return z * min(max(z + 3, mpf(0)), mpf(6)) / 6
    if name == "sigmoid":
        return 1 / (1 + mpmath.exp(-z))
    if name == "tanh":
        return mpmath.tanh(z)
    if name == "silu":
        return z / (1 + mpmath.exp(-z))
    if name == "gelu":
        return z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    if name == "gelu_tanh":
        return z / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpf("0.044715") * z**3)))
    return z * mpmath.tanh(mpmath.log1p(mpmath.exp(z)))


def exact_group_norm(
    x, num_groups, weight=None, bias=None, eps=1e-5, residual=None, activation=None, mask=None
):
    """Object array of mpf, for x of shape (N, C, S); the channels of group g are consecutive."""
    n_all, c_all, s_all = x.shape
    keep = np.broadcast_to(True if mask is None else mask, x.shape)
    y = np.empty(x.shape, dtype=object)
    for n, g in itertools.product(range(n_all), range(num_groups)):
        size = c_all // num_groups
        slab = list(itertools.product(range(g * size, (g + 1) * size), range(s_all)))
        counted = [mpf(x[n, c, s]) for c, s in slab if keep[n, c, s]]
        mean = sum(counted, mpf(0)) / max(len(counted), 1)
        var = sum(((v - mean) ** 2 for v in counted), mpf(0)) / max(len(counted), 1)
        for c, s in slab:
            z = (mpf(x[n, c, s]) - mean) / mpmath.sqrt(var + mpf(eps))
            if weight is not None:
                z *= mpf(weight[c] if weight.ndim == 1 else weight[n, c])
            if bias is not None:
                z += mpf(bias[c] if bias.ndim == 1 else bias[n, c])
            if residual is not None:
                z += mpf(residual[n, c, s])
            y[n, c, s] = exact_activation(activation, z)
    return y


def exact_gradient(dy, arguments, name, **options):
    """Of sum(dy * y), by central differences: 60 digits leave 40 after a step of 1e-20."""
    step = mpf(10) ** -20
    base = arguments[name]
    gradient = np.empty(base.shape)
    for index in np.ndindex(base.shape):
        loss = []
        for sign in (1, -1):
            moved = np.array([mpf(v) for v in base.ravel()], dtype=object).reshape(base.shape)
            moved[index] += sign * step
            y = exact_group_norm(**{**arguments, name: moved}, **options)
            loss.append(sum(mpf(d) * v for d, v in zip(dy.ravel(), y.ravel(), strict=True)))
        gradient[index] = float((loss[0] - loss[1]) / (2 * step))
    return gradient


def deviation(y, exact):
    """|y - exact| as float64, taken before exact is rounded."""
    return np.array(
        [float(abs(mpf(float(a)) - b)) for a, b in zip(y.ravel(), exact.ravel(), strict=True)]
    ).reshape(y.shape)


# ---- the forward pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("parameters", ["none", "channel", "sample", "mixed"])
def test_float64_is_within_4_ulp_of_exact(offset, parameters):
    rng = np.random.default_rng(int(offset))
    x = offset + rng.standard_normal((2, 6, 5))
    shape = {"none": None, "channel": (6,), "sample": (2, 6), "mixed": (6,)}[parameters]
    weight = None if shape is None else rng.standard_normal(shape)
    bias = None if shape is None else rng.standard_normal((2, 6) if parameters == "mixed" else 6)
    y, moments = reference.group_norm(x, 3, weight, bias, return_moments=True)
    exact = exact_group_norm(x, 3, weight, bias)
    # The rounding of x - mean and of the mean itself; the affine step's own two roundings.
    rstd = np.repeat(moments.rstd(), 2, axis=1)[..., None]
    mean = np.repeat(moments.mean, 2, axis=1)[..., None]
    w = 1.0 if weight is None else np.abs(weight)[..., None]
    b = 0.0 if bias is None else np.abs(bias)[..., None]
    scale = w * (np.abs(x - mean) * rstd + np.abs(mean) * rstd) + b
    assert np.all(deviation(y, exact) <= 4 * ULP * scale)


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [("float16", 0), ("float16", 100), ("bfloat16", 0), ("bfloat16", 10)]
    + [("float32", offset) for offset in (0, 1e2, 1e4, 1e6)],
)
def test_narrow_results_are_rounded_once(dtype, offset):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = (offset + np.random.default_rng(3).standard_normal((2, 4, 30))).astype(dtype)
    y = reference.group_norm(x, 2)
    assert y.dtype == x.dtype
    exact = exact_group_norm(x.astype(np.float64), 2)
    # Half a unit of the last place: no neighbour is nearer, but for float64's own error, which
    # is that of the mean (half an ulp of it) on top of a few roundings.
    slack = 4 * ULP * (4 + offset)
    below = np.nextafter(y, np.array(-np.inf, y.dtype)).astype(np.float64)
    above = np.nextafter(y, np.array(np.inf, y.dtype)).astype(np.float64)
    own = deviation(y.astype(np.float64), exact)
    assert np.all(own <= deviation(below, exact) + slack)
    assert np.all(own <= deviation(above, exact) + slack)


def test_bfloat16_does_not_round_by_way_of_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    just_over_half = 1 + 2**-8 + 2**-40  # float32 sees the tie, and ties go to the even 1
    values = np.array([just_over_half, -just_over_half, 1 + 2**-8, np.inf, -0.0, 1e300, 1e-300])
    with np.errstate(over="ignore"):
        rounded = reference._round(values, ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(rounded, [1 + 2**-7, -1 - 2**-7, 1, np.inf, -0.0, np.inf, 0])
    assert np.signbit(rounded[4])
    assert np.isnan(reference._round(np.array(np.nan), ml_dtypes.bfloat16).astype(np.float64))


def test_the_divisor_is_the_root():
    x = np.random.default_rng(0).random((8, 16, 50, 50))
    y = reference.group_norm(x, 4)
    assert y.std() == pytest.approx(1, abs=1e-3)
    # Without the root, uniform data has 1 / std = sqrt(12) = 3.46 in place of 1.
    without = y * reference.group_moments(x, 4).rstd()[0, 0]
    assert without.std() == pytest.approx(12**0.5, rel=1e-2)


def test_an_example_by_hand_is_exact():
    x = np.array([[[1, 3], [10, 30]]])
    np.testing.assert_array_equal(reference.group_norm(x, 2, eps=0.0), [[[-1, 1], [-1, 1]]])
    m = reference.group_moments(x, 1)
    assert (m.count.item(), m.mean.item(), m.m2.item()) == (4, 11, 526)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes_are_right_over_the_whole_range(name):
    z = np.concatenate([np.linspace(-38, 38, 152), [-700, -100, -1e-8, 1e-300, 100, 1e30, 1e300]])
    value, slope = reference._ACTIVATIONS[name](z)
    with mpmath.workdps(400):  # 1 + tanh(u) loses as many digits as float64 has decades
        exact = np.array([exact_activation(name, mpf(v)) for v in z])
        exact_slope = np.array([mpmath.diff(lambda t: exact_activation(name, t), v) for v in z])
        share = np.array([abs(float(a / mpf(v))) for a, v in zip(exact, z, strict=True)])
    # On the left all are z * e^u at heart, and e^u has the relative error of u times u; u is z,
    # z^2 / 2 (gelu) or a cubic (gelu_tanh). The slope adds a term that is up to u times as large.
    t = np.clip(-z, 0, 40)
    u = 1 + {"gelu": t**2 / 2, "gelu_tanh": 1.6 * t + 0.0714 * t**3}.get(name, t)
    tiny = (1 + t) * np.finfo(np.float64).tiny  # e^u has subnormal digits, times z
    assert np.all(deviation(value, exact) <= 4 * ULP * (u * np.abs(value) + tiny))
    assert np.all(deviation(slope, exact_slope) <= 4 * ULP * u * (u * share + tiny))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_the_slopes_of_what_levels_off_keep_their_digits_on_both_sides(name):
    z = np.concatenate([np.linspace(-300, 300, 601), [-1e-8, 1e-300]])
    _, slope = reference._ACTIVATIONS[name](z)
    with mpmath.workdps(400):
        exact = [mpmath.diff(lambda t: exact_activation(name, t), mpf(v)) for v in z]
    assert np.all(deviation(slope, np.array(exact)) <= 8 * ULP * slope)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", ("leaky_relu", -2), ("leaky_relu", 0.0), "hardswish"])
def test_at_a_kink_and_at_nan_they_are_those_of_pytorch(name):
    torch = pytest.importorskip("torch")
    for point in (-3.0, -0.0, 0.0, 3.0, np.nan, *np.nextafter([-3, 0, 3], -9), *np.nextafter([-3, 0, 3], 9)):
        z = np.full((1, 64), point)  # a whole vector: hardswish's scalars have another slope at NaN
        for d in (1.5, np.nan):
            leaf = torch.tensor(z, requires_grad=True)
            y = activation_of_pytorch(name)(leaf)
            y.backward(torch.full(z.shape, d))
            moments = Moments([[1]], [[0.0]], [[1.0]])
            arguments = {"num_groups": 1, "eps": 0.0, "moments": moments, "activation": name, "residual": z}
            ours = reference.group_norm(np.zeros((1, 64)), **arguments)
            np.testing.assert_allclose(ours, y.detach().numpy(), rtol=2 * ULP, atol=5e-324)
            slopes = reference.group_norm_backward(np.full(z.shape, d), np.zeros((1, 64)), **arguments)[-1]
            np.testing.assert_array_equal(slopes, leaf.grad.numpy())


LIMITS = {  # of value and slope, at -inf, inf and NaN
    "relu": ([0, np.inf, np.nan], [0, 1, 1]),
    "leaky_relu": ([-np.inf, np.inf, np.nan], [0.01, 1, 0.01]),
    "sigmoid": ([0, 1, np.nan], [0, 0, np.nan]),
    "tanh": ([-1, 1, np.nan], [0, 0, np.nan]),
}


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_activations_have_their_limits_at_infinity(name):
    values, slopes = LIMITS.get(name, ([0, np.inf, np.nan], [0, 1, np.nan]))
    value, slope = reference._ACTIVATIONS[name](np.array([-np.inf, np.inf, np.nan]))
    np.testing.assert_array_equal(value, values)
    np.testing.assert_array_equal(slope, slopes)


def test_swish_is_silu():
    assert reference._ACTIVATIONS["swish"] is reference._ACTIVATIONS["silu"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_option_together_is_exact(name):
    rng = np.random.default_rng(5)
    x, residual = rng.standard_normal((2, 2, 6, 4))
    mask = np.array([[[1, 0, 1, 1]], [[0, 0, 1, 0]]], dtype=bool)
    options = {"residual": residual, "activation": name, "mask": mask}
    weight, bias = rng.standard_normal((2, 6)), rng.standard_normal(6)
    y = reference.group_norm(x, 2, weight, bias, 0.1, **options)
    exact = exact_group_norm(x, 2, weight, bias, 0.1, **options)
    scale = np.abs(weight).max() * np.abs(x).max() / 0.1**0.5 + 4
    assert deviation(y, exact).max() <= 4 * ULP * scale


# ---- the statistics ------------------------------------------------------------------------------

NIST = sorted((Path(__file__).parent / "data" / "nist").glob("*.dat"))


def certified(path):
    lines = path.read_text().splitlines()
    mean, std = (
        Fraction(next(line for line in lines if line.startswith(start)).split(":")[-1].split()[0])
        for start in ("Sample Mean", "Sample Standard Deviation")
    )
    data = lines[next(i for i, line in enumerate(lines) if line.startswith("---")) + 1 :]
    return mean, std, np.array([float(line) for line in data if line.strip()])


@pytest.mark.parametrize("path", NIST, ids=lambda path: path.stem)
def test_statistics_are_those_certified_by_nist(path):
    mean, std, x = certified(path)
    m = reference.group_moments(x[None, None], 1)
    assert m.count.item() == x.size
    # The certified values have 15 digits; x is rounded to float64, which moves std by mean / std.
    assert m.mean.item() == pytest.approx(float(mean), rel=5e-15)
    slack = 5e-15 + 2 * ULP * float(abs(mean) / std)
    assert math.sqrt(m.m2.item() / (x.size - 1)) == pytest.approx(float(std), rel=slack)


def test_there_are_eight_certified_data_sets():
    assert len(NIST) == 8


@pytest.mark.parametrize("ratio", [0, 1, 1e4, 1e8, 1e12, 1e15])
def test_statistics_are_exact_for_the_data_as_given(ratio):
    x = ratio + np.random.default_rng(1).standard_normal((1, 1, 997))
    values = [Fraction(v) for v in x.ravel()]
    mean = sum(values) / len(values)
    m2 = sum((v - mean) ** 2 for v in values)
    m = reference.group_moments(x, 1)
    assert abs(Fraction(m.mean.item()) - mean) <= ULP * (abs(mean) + 1)
    assert abs(Fraction(m.m2.item()) / m2 - 1) <= 8 * ULP


@pytest.mark.parametrize("value", [0.1, 1e30, 1e308, -5e-324])
def test_a_constant_slab_has_its_value_and_no_variance(value):
    m = reference.group_moments(np.full((1, 2, 37), value), 1)
    assert (m.mean.item(), m.m2.item()) == (pytest.approx(value, rel=ULP, abs=5e-324), 0)


def test_a_masked_position_does_not_count_whatever_it_holds():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 3, 5))
    padded = np.concatenate([x, np.full((2, 4, 3, 2), np.nan)], axis=-1)
    mask = np.arange(7) < 5
    for form in (mask, mask[None, None, None], np.broadcast_to(mask, (2, 1, 3, 7))):
        m = reference.group_moments(padded, 2, mask=form)
        np.testing.assert_array_equal(m.count, 2 * 15)
        np.testing.assert_allclose(m.mean, reference.group_moments(x, 2).mean, rtol=0, atol=ULP)
    y = reference.group_norm(padded, 2, mask=mask)
    np.testing.assert_allclose(y[..., :5], reference.group_norm(x, 2), rtol=0, atol=8 * ULP)


@pytest.mark.parametrize("shape", [(2, 4, 0), (0, 4, 3), (0, 4), (2, 0, 3)])
def test_nothing_counted_is_count_mean_and_m2_of_zero(shape):
    x = np.zeros(shape)
    y, m = reference.group_norm(x, 2, return_moments=True)
    assert y.shape == shape
    for array in (m.count, m.mean, m.m2, m.var):
        np.testing.assert_array_equal(array, np.zeros((shape[0], 2)))
    dx, dweight, dbias = reference.group_norm_backward(
        x, x, 2, np.ones(shape[1]), np.ones(shape[1])
    )
    assert dx.shape == shape
    np.testing.assert_array_equal([dweight, dbias], np.zeros((2, shape[1])))


def test_a_fully_masked_slab_is_scaled_by_the_root_of_eps():
    x = np.random.default_rng(0).standard_normal((2, 4, 3))
    mask = np.array([True, False]).reshape(2, 1, 1)
    y, m = reference.group_norm(x, 2, eps=0.25, mask=mask, return_moments=True)
    np.testing.assert_array_equal(m.count, [[6, 6], [0, 0]])
    np.testing.assert_array_equal(y[1], 2 * x[1])
    np.testing.assert_array_equal(
        reference.group_norm_backward(x, x, 2, eps=0.25, mask=mask)[0][1], 2 * x[1]
    )


# ---- what NaN, infinity and eps=0 do -------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_poison_stays_in_its_slab_and_nothing_warns(poison, name):
    x = np.random.default_rng(0).standard_normal((2, 4, 3))
    x[0, 1, 2] = poison
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, m = reference.group_norm(x, 2, activation=name, return_moments=True)
        dx, _, _ = reference.group_norm_backward(np.ones_like(x), x, 2, activation=name)
    for result in (y, dx):
        assert np.isnan(result[0, :2]).all()
        assert np.isfinite(result[0, 2:]).all()
        assert np.isfinite(result[1]).all()
    np.testing.assert_array_equal(np.isnan(m.m2), [[True, False], [False, False]])


def test_eps_zero_on_a_constant_slab_is_nan_and_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(reference.group_norm(np.ones((1, 2, 3)), 1, eps=0.0)).all()
        reference.group_norm_backward(np.ones((1, 2, 3)), np.ones((1, 2, 3)), 1, eps=0.0)


@pytest.mark.parametrize("value", [0.1, 1e300, -3e38])
def test_a_slab_of_one_element_is_the_bias(value):
    y = reference.group_norm([[value, value]], 2, [3.0, 4.0], [0.3, -0.7], activation="relu")
    np.testing.assert_array_equal(y, [[0.3, 0.0]])


def test_float64_data_near_overflow_has_a_finite_mean():
    m = reference.group_moments(np.array([[1.7e308, 1.6e308, 1.7e308, 1.6e308]]), 1)
    assert m.mean.item() == pytest.approx(1.65e308, rel=2 * ULP)


# ---- dtypes, layouts, arguments ------------------------------------------------------------------


def test_integers_and_bools_are_promoted_to_float64():
    x = np.random.default_rng(0).integers(0, 2, (2, 4, 6))
    expected = reference.group_norm(x.astype(np.float64), 2)
    for dtype in (np.int8, np.uint64, np.bool_, ">i4"):
        y = reference.group_norm(x.astype(dtype), 2)
        assert y.dtype == np.float64
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", ["complex128", "object", "longdouble", "M8[s]", "U1"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="x must be float16"):
        reference.group_norm(np.zeros((2, 2)).astype(dtype), 1)


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2])
def test_the_channels_may_be_at_any_axis_but_the_first(axis):
    rng = np.random.default_rng(0)
    x, dy, residual = rng.standard_normal((3, 2, 6, 3, 5))
    mask = rng.random((2, 1, 3, 5)) < 0.7
    weight, bias = rng.standard_normal((2, 6)), rng.standard_normal(6)

    def moved(a):
        return np.moveaxis(a, 1, axis)

    options = {"activation": "silu", "residual": residual, "mask": mask}
    at_axis = options | {"residual": moved(residual), "mask": moved(mask), "axis": axis}
    y = reference.group_norm(x, 3, weight, bias, **options)
    result = reference.group_norm(moved(x), 3, weight, bias, **at_axis)
    np.testing.assert_array_equal(result, moved(y))
    assert result.strides == moved(x).strides
    dx, *parameters, dresidual = reference.group_norm_backward(dy, x, 3, weight, bias, **options)
    results = reference.group_norm_backward(moved(dy), moved(x), 3, weight, bias, **at_axis)
    for result, expected in zip(results, (moved(dx), *parameters, moved(dresidual)), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_out_takes_the_result_and_may_be_an_input():
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 4, 5))
    y = reference.group_norm(x, 2)
    dx, _, _ = reference.group_norm_backward(dy, x, 2)
    assert reference.group_norm_backward(dy, x, 2, out=dy)[0] is dy
    assert reference.group_norm(x, 2, out=x) is x
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(dy, dx)


X = np.zeros((2, 6, 3))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_groups", {"num_groups": 4}),
        ("num_groups", {"num_groups": 0}),
        ("x", {"x": np.zeros(6)}),
        ("weight", {"weight": np.ones(1)}),
        ("weight", {"weight": np.ones((3, 6))}),
        ("bias", {"bias": np.ones((6, 3))}),
        ("residual", {"residual": np.ones((6, 3))}),
        ("mask", {"mask": np.ones((2, 6, 3), dtype=bool)}),
        ("mask", {"mask": np.ones((1, 2, 1, 3), dtype=bool)}),
        ("mask", {"mask": np.ones(3)}),
        ("moments", {"moments": Moments([[1]], [[0.0]], [[0.0]])}),
        ("activation", {"activation": "SiLU"}),
        ("activation", {"activation": ("relu", 0.1)}),
        ("activation", {"activation": ["leaky_relu", 0.1]}),
        ("axis", {"axis": 0}),
        ("axis", {"axis": -3}),
        ("axis", {"axis": 3}),
        ("out", {"out": np.zeros((2, 6))}),
        ("out", {"out": np.zeros((2, 6, 3), dtype=np.float32)}),
    ],
)
def test_nothing_is_broadcast_that_should_not_be(name, arguments):
    arguments = {"x": X, "num_groups": 2} | arguments
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must"):
        reference.group_norm(**arguments)
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must"):
        reference.group_norm_backward(arguments["x"], **arguments)


def test_dy_must_have_the_shape_of_x():
    with pytest.raises(ValueError, match=r"^dy must"):
        reference.group_norm_backward(np.zeros((1, 6, 3)), X, 2)


# ---- the gradient --------------------------------------------------------------------------------

MASK = np.array([[[1, 0, 1]], [[0, 0, 1]], [[0, 0, 0]]], dtype=bool)  # one sample with nothing left


def problem(parameters, *, mask, residual, seed=7):
    """Sample 1 of (3, 4, 3) in 2 groups counts 2 of 6 values of each slab, sample 2 none."""
    rng = np.random.default_rng(seed)
    x, dy, added = rng.standard_normal((3, 3, 4, 3))
    arguments = {"x": x, "num_groups": 2, "eps": 0.3}
    if parameters is not None:
        arguments |= {"weight": rng.standard_normal(parameters), "bias": rng.standard_normal(4)}
    if mask:
        arguments["mask"] = MASK
    if residual:
        arguments["residual"] = added
    return dy, arguments


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("parameters", [(4,), (3, 4)])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_the_gradient_is_that_of_the_definition(name, parameters, mask):
    dy, arguments = problem(parameters, mask=mask, residual=True)
    results = reference.group_norm_backward(dy, **arguments, activation=name)
    # Some tens of terms of size 10 at most, each with a few roundings.
    for argument, gradient in zip(("x", "weight", "bias", "residual"), results, strict=True):
        expected = exact_gradient(dy, arguments, argument, activation=name)
        assert gradient.shape == arguments[argument].shape
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=64 * ULP)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("parameters", [None, (4,), (3, 4)])
def test_forward_and_gradient_agree_by_central_differences(name, mask, residual, parameters):
    dy, arguments = problem(parameters, mask=mask, residual=residual, seed=8)
    results = reference.group_norm_backward(dy, **arguments, activation=name)
    for argument, gradient in zip(("x", "weight", "bias", "residual"), results, strict=False):
        if argument not in arguments:
            assert gradient is None
            continue
        base, step = arguments[argument], 1e-5
        for index in np.ndindex(base.shape):
            plus, minus = base.copy(), base.copy()
            plus[index] += step
            minus[index] -= step
            rise = sum(
                sign * (dy * reference.group_norm(**(arguments | moved), activation=name)).sum()
                for sign, moved in ((1, {argument: plus}), (-1, {argument: minus}))
            )
            # The third derivative, some tens, times step^2 / 6; and the rounding of rise / step.
            assert gradient[index] == pytest.approx(rise / (2 * step), abs=1e-7)


def test_the_gradient_of_a_tile_flows_through_the_moments_of_the_whole():
    dy, arguments = problem((4,), mask=False, residual=True)
    dy[..., 2:] = 0  # a loss of the first tile's outputs only
    x, residual = arguments.pop("x"), arguments.pop("residual")
    whole = reference.group_norm_backward(dy, x, **arguments, residual=residual, activation="gelu")
    moments = reference.group_moments(x, 2)
    tile = reference.group_norm_backward(
        dy[..., :2],
        x[..., :2],
        **arguments,
        residual=residual[..., :2],
        activation="gelu",
        moments=moments,
    )
    np.testing.assert_allclose(tile[0], whole[0][..., :2], rtol=0, atol=16 * ULP)
    np.testing.assert_allclose(tile[1], whole[1], rtol=0, atol=16 * ULP)
    again = reference.group_norm_backward(
        dy, x, **arguments, residual=residual, activation="gelu", moments=moments
    )
    for given, computed in zip(again, whole, strict=True):
        np.testing.assert_array_equal(given, computed)


def test_given_moments_that_counted_nothing_are_constants():
    dy, arguments = problem(None, mask=False, residual=False)
    nothing = Moments(np.zeros((3, 2), int), np.zeros((3, 2)), np.zeros((3, 2)))
    dx, _, _ = reference.group_norm_backward(dy, **arguments, moments=nothing)
    np.testing.assert_allclose(dx, dy / 0.3**0.5, rtol=4 * ULP)


def test_gradients_have_the_dtype_of_their_argument():
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    weight, bias = np.ones(4, np.float16), np.ones((2, 4), np.float64)
    results = reference.group_norm_backward(x.astype(np.float64), x, 2, weight, bias, residual=x)
    assert [g.dtype for g in results] == [np.float32, np.float16, np.float64, np.float32]
    assert [g.shape for g in results] == [x.shape, (4,), (2, 4), x.shape]


@pytest.mark.parametrize("name", [*ACTIVATIONS, "swish", ("leaky_relu", -0.7)])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (3, 6, 4, 5), (1, 6, 2, 3, 4)])
def test_agrees_with_the_automatic_gradient_of_pytorch(name, shape):
    torch = pytest.importorskip("torch")
    f, activation = torch.nn.functional, activation_of_pytorch(name)
    rng = np.random.default_rng(9)
    arrays = [rng.standard_normal(s) for s in (shape, 6, 6, shape, shape)]
    x, weight, bias, residual, dy = arrays
    leaves = [torch.tensor(a, requires_grad=True) for a in arrays[:4]]
    y = activation(f.group_norm(leaves[0], 3, leaves[1], leaves[2], 0.1) + leaves[3])
    y.backward(torch.tensor(dy))
    options = {"eps": 0.1, "residual": residual, "activation": name}
    ours = reference.group_norm(x, 3, weight, bias, **options)
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=0, atol=256 * ULP)
    gradients = reference.group_norm_backward(dy, x, 3, weight, bias, **options)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=256 * ULP)


# ---- Moments -------------------------------------------------------------------------------------


def same(a, b):
    np.testing.assert_array_equal(a.count, b.count)
    # Each of the parts' means is rounded to its last place, and m2 has it times a deviation.
    rounding = 4 * ULP * (1 + np.abs(b.mean))
    assert np.all(np.abs(a.mean - b.mean) <= rounding)
    assert np.all(np.abs(a.m2 - b.m2) <= rounding * b.count + 8 * ULP * b.m2)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_tiles_merge_to_the_whole_in_any_order_and_nesting(offset):
    x = offset + np.random.default_rng(2).standard_normal((2, 4, 100))
    whole = reference.group_moments(x, 2)
    cuts = [0, 1, 1, 30, 37, 100]  # one value, none, and the rest
    parts = [reference.group_moments(x[..., i:j], 2) for i, j in itertools.pairwise(cuts)]
    for a, b, c, d, e in itertools.permutations(parts):
        same(a.merge(b, c, d, e), whole)
    a, b, c, d, e = parts
    same(a.merge(b.merge(c), d.merge(e)), a.merge(b).merge(c).merge(d, e))
    tiles = [
        reference.group_norm(x[..., i:j], 2, moments=whole) for i, j in itertools.pairwise(cuts)
    ]
    np.testing.assert_array_equal(np.concatenate(tiles, axis=-1), reference.group_norm(x, 2))


def test_an_empty_part_changes_nothing():
    some = Moments([[3, 3]], [[1e200, np.nan]], [[2.0, np.nan]])
    none = Moments([[0, 0]], [[0.0, np.nan]], [[0.0, np.nan]])
    for merged in (some.merge(none), none.merge(some), some.merge()):
        for field in ("count", "mean", "m2"):
            np.testing.assert_array_equal(getattr(merged, field), getattr(some, field))
    np.testing.assert_array_equal(none.var, [[0, 0]])
    np.testing.assert_array_equal(none.rstd(0.25), [[2, 2]])


def test_counts_may_be_huge():
    half = Moments([[2**61]], [[1.0]], [[2.0**61]])
    merged = half.merge(Moments([[2**61]], [[3.0]], [[2.0**61]]))
    assert (merged.count.item(), merged.mean.item(), merged.var.item()) == (2**62, 2, 2)


def test_moments_take_array_likes_and_are_frozen():
    m = Moments(np.array([[4]], dtype=np.uint8), [[1]], np.float32([[2]]))
    assert [a.dtype for a in (m.count, m.mean, m.m2)] == [np.int64, np.float64, np.float64]
    with pytest.raises(AttributeError):
        m.mean = m.m2


@pytest.mark.parametrize(
    ("error", "name", "arrays"),
    [
        (ValueError, "count", (2, 0.0, 0.0)),
        (ValueError, "mean", ([[2]], [[0.0, 0.0]], [[0.0]])),
        (ValueError, "m2", ([[2]], [[0.0]], [0.0])),
        (ValueError, "count", ([[-1]], [[0.0]], [[0.0]])),
        (ValueError, "m2", ([[2]], [[0.0]], [[-1e-9]])),
        (TypeError, "count", ([[2.0]], [[0.0]], [[0.0]])),
        (TypeError, "mean", ([[2]], [["a"]], [[0.0]])),
        (TypeError, "m2", ([[2]], [[0.0]], [[1j]])),
    ],
)
def test_moments_refuse_what_cannot_be(error, name, arrays):
    with pytest.raises(error, match=f"^{name} must"):
        Moments(*arrays)


def test_only_moments_of_the_same_shape_merge():
    m = Moments([[1]], [[0.0]], [[0.0]])
    with pytest.raises(ValueError, match=r"^others must"):
        m.merge(Moments([[1, 1]], [[0.0, 0.0]], [[0.0, 0.0]]))
    with pytest.raises(TypeError, match=r"^others must"):
        m.merge((1, 0.0, 0.0))

"""How near the results are to exact ones, in every layout, for |mean| / std up to 1e6.

float32 within 2 ulp at the scale |weight| * (|xhat| + 1/16) + |bias|, 16 bits rounded once more, float64
within 4 ulp at the scale |weight| * (|xhat| + |mean| * rstd) + |bias|.
"""

import math
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from helpers import (
    DTYPES,
    EPS32,
    EPS64,
    LAYOUTS,
    RATIOS,
    assert_within_bound,
    exact_group_norm_in_40_digits,
    exact_statistics,
    in_layout,
    name_of,
    normal,
    slabs_of,
)

import gn_fast

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
every_ratio = pytest.mark.parametrize("ratio", RATIOS)

# Channels-first works on blocks of 4,096 values, in chunks of 65536. All short tails, then the edges.
LENGTHS = [
    *range(1, 200), 255, 256, 257, 511, 513, 1023, 1025, 1999, 2047, 2048, 2049, 2111, 2112, 2113, 4095,
    4096, 4097, 4160, 6143, 6211, 65535, 65536, 65537, 67583, 131071, 131073,
]  # fmt: skip
# Channels-last adds up 16 rows at a time, and at last up to 31; few channels put several positions in a row.
CHANNELS = [
    2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 31, 32, 33, 42, 43, 60, 63, 64, 65, 66, 85, 96, 127,
    128, 129, 130, 171, 255, 256, 257, 384, 510, 511, 512, 513, 514, 768, 1023, 1024, 1025, 1026, 1536,
    2049,
]  # fmt: skip
POSITIONS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 257]


def check(rng, shape, num_groups, ratio, layout, dtype=np.float32, parameters=True, **arguments):
    x = in_layout(normal(rng, shape, dtype, mean=ratio), layout)
    weight = normal(rng, shape[1]) if parameters else None
    bias = normal(rng, shape[1]) if parameters else None
    y = gn_fast.group_norm(x, num_groups, weight, bias, **arguments)
    assert y.dtype == x.dtype
    assert_within_bound(y, x, num_groups, weight, bias, what=f"{shape} / {num_groups} {layout} ~ {ratio}")


def divisors(c):
    return [d for d in range(1, c + 1) if c % d == 0]


# ---- float32 ---------------------------------------------------------------------------------------------


@every_ratio
def test_every_tail_of_a_slab_in_channels_first(ratio):
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        check(rng, (1, 1, length), 1, ratio, "channels-first")
        check(rng, (1, 2, length), 1, ratio, "channels-first", parameters=False)
    for positions in (*range(1, 20), 49, 64, 196):
        check(rng, (2, 42, positions), 2, ratio, "channels-first")
    for length in (7, 64, 2049, 5001):
        check(rng, (2, length), 1, ratio, "channels-first")  # 2-D, where weight changes with every element


@every_ratio
def test_every_width_and_length_in_channels_last(ratio):
    rng = np.random.default_rng(0)
    for c in CHANNELS:
        for groups in divisors(c)[:: max(1, len(divisors(c)) // 3)]:
            for positions in rng.choice(POSITIONS, 3, replace=False):
                check(rng, (1, c, int(positions)), groups, ratio, "channels-last")
    for positions in (*range(1, 70), 255, 256, 257, 511, 512, 513, 1025, 16385, 22001):
        check(rng, (2, 3, positions), 1, ratio, "channels-last")


@every_ratio
@both_layouts
def test_every_rank_and_prime_sizes(ratio, layout):
    rng = np.random.default_rng(0)
    for shape in (
        (3, 14),
        (3, 14, 11),
        (2, 26, 7, 13),
        (2, 22, 3, 5, 7),
        (2, 10, 3, 2, 5, 7),
        (1, 97, 101),
        (13, 6, 31),
    ):
        for groups in divisors(shape[1]):
            check(rng, shape, groups, ratio, layout)


@every_ratio
@both_layouts
def test_groups_of_one_and_of_thousands_of_channels(ratio, layout):
    rng = np.random.default_rng(0)
    for c, groups in ((1, 1), (61, 61), (3000, 1), (3000, 2), (4097, 1), (4096, 4096), (2500, 500)):
        check(rng, (2, c, 5), groups, ratio, layout)


@both_layouts
def test_a_thousand_times_its_deviation_in_channels_last(layout):
    """The headline: float32 of mean 1000, where the naive variance or shift loses three digits and more."""
    rng = np.random.default_rng(0)
    check(rng, (2, 32, 64, 64), 8, 1000.0, layout)
    check(rng, (2, 32, 64, 64), 8, 1000.0, layout, parameters=False)


@both_layouts
def test_large_slabs(layout):
    rng = np.random.default_rng(0)
    for ratio in (0.0, 1e6):
        check(rng, (1, 4, 700, 701), 1, ratio, layout)


@both_layouts
@pytest.mark.parametrize("length", [513, 576, 700, 1024, 1100, 2048, 4096, 20000])
def test_roundings_within_a_block_do_not_add_up(length, layout):
    """A pivot as large as the values rounds every difference from it the same way."""
    for seed in [*range(20), 68, 124, 158, 249]:
        x = np.random.default_rng(seed).uniform(-2, 2, (1, length)).astype(np.float32)
        for shape in ((1, 1, length), (1, length), (1, 4, length // 4)):
            values = in_layout(x[:, : math.prod(shape)].reshape(shape), layout)
            assert_within_bound(gn_fast.group_norm(values, 1), values, 1, what=f"{shape}, seed {seed}")


@both_layouts
def test_data_that_drifts_and_jumps_within_a_slab(layout):
    """Later blocks are far from where the first ones suggest that the mean is."""
    ramp = np.linspace(-1e3, 1e3, 2 * 8 * 3001, dtype=np.float32).reshape(2, 8, 3001)
    steps = np.where(np.arange(3001) < 2999, np.float32(1), np.float32(1e5)) * np.ones((2, 8, 1), np.float32)
    by_channel = (
        normal(np.random.default_rng(0), (2, 8, 3001)) + 1e4 * np.arange(8, dtype=np.float32)[:, None]
    )
    for x in (
        ramp,
        ramp[..., ::-1],
        steps,
        steps[..., ::-1],
        by_channel,
        np.cumsum(by_channel, -1, np.float32),
    ):
        x = in_layout(x, layout)
        assert_within_bound(gn_fast.group_norm(x, 2), x, 2)


@both_layouts
@pytest.mark.parametrize(
    "magnitude", [1e-44, 1e-40, 1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e20, 1e30, 3e38]
)
def test_values_near_the_ends_of_float32(layout, magnitude):
    rng = np.random.default_rng(0)
    for shape, groups in (((2, 6, 700), 2), ((2, 6, 3), 3), ((1, 130, 40), 2)):
        for low in (-1, 0.5):
            x = in_layout((magnitude * rng.uniform(low, 1, shape)).astype(np.float32), layout)
            weight, bias = normal(rng, (2, shape[1]))
            for eps in (0.0, 1e-5):
                y = gn_fast.group_norm(x, groups, weight, bias, eps)
                assert_within_bound(y, x, groups, weight, bias, eps, f"{shape}, from {low}, eps={eps}")


@both_layouts
def test_huge_and_tiny_values_in_one_slab(layout):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 4, 999)) * 10.0 ** rng.integers(-40, 37, (2, 4, 999))).astype(np.float32)
    x = in_layout(x, layout)
    assert_within_bound(gn_fast.group_norm(x, 2, eps=0.0), x, 2, eps=0.0)


@both_layouts
@pytest.mark.parametrize("spread", [False, True], ids=["the first", "any"])
def test_few_values_that_a_mask_leaves_of_a_large_slab(spread, layout):
    """float32 sums of few values do not average out, however large the slab is."""
    rng = np.random.default_rng(0)
    for channels in (2, 8):
        for left in (1, 2, 3, 5, 9, 17, 30, 60, 100, 127, 250):
            for positions in (512, 3000):
                x = normal(rng, (2, channels, positions), mean=rng.choice([0.0, 1.0, 30.0]))
                counts = np.arange(positions) < left
                if spread:
                    rng.shuffle(counts)
                y = gn_fast.group_norm(in_layout(x, layout), 2, mask=counts)
                what = f"{channels} channels, {left} of {positions}"
                assert_within_bound(y[..., counts], x[..., counts], 2, what=what)


@both_layouts
def test_eps_of_every_size(layout):
    rng = np.random.default_rng(0)
    x = in_layout(normal(rng, (2, 6, 301), mean=5), layout)
    for eps in (0.0, 1e-300, 1e-12, 1e-5, 1e-2, 1.0, 1e10, 1e60):
        assert_within_bound(gn_fast.group_norm(x, 2, eps=eps), x, 2, eps=eps, what=f"eps={eps}")


# ---- 16 bits and float64 ---------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2])
def test_16_bits_are_rounded_once(dtype, ratio, layout):
    rng = np.random.default_rng(0)
    for shape, groups in (
        ((2, 6, 1), 2),
        ((3, 14), 7),
        ((2, 42, 49), 2),
        ((2, 6, 37, 61), 3),
        ((1, 515, 40), 1),
    ):
        check(rng, shape, groups, ratio, layout, dtype)
        check(rng, shape, groups, ratio, layout, dtype, parameters=False)


@both_layouts
def test_many_channels_of_equal_float64_sums_lose_nothing(layout):
    """Zeros and ones, as what ReLU leaves or a bool: all channels have about the same sums."""
    x = in_layout(np.random.default_rng(0).integers(0, 2, (1, 20000, 8)).astype(np.float64), layout)
    m = gn_fast.group_moments(x, 1)
    ones = int(x.sum())
    m2 = Fraction(ones * (x.size - ones), x.size)
    assert abs(float(Fraction(m.m2[0, 0]) / m2 - 1)) <= 8 * EPS64


@both_layouts
@every_ratio
def test_float64_is_within_4_ulp(ratio, layout):
    rng = np.random.default_rng(0)
    shapes = (
        ((2, 6, 1), 2),
        ((3, 14), 7),
        ((2, 6, 7, 5), 3),
        ((1, 2, 2113), 1),
        ((1, 33, 65), 11),
        ((1, 514, 5), 1),
        (
            (1, 48, 36, 37),
            48,
        ),  # so few values that the mean is not averaged out of what rounding leaves of its sum
        ((1, 64, 15, 16), 16),
        ((2, 2, 5000), 1),
    )
    for shape, groups in shapes:
        x = in_layout(normal(rng, shape, np.float64, mean=ratio), layout)
        weight, bias = normal(rng, (2, shape[1]), np.float64)
        bias[::2] = 0  # where the mean of x lies, all of y is what its error leaves
        y = gn_fast.group_norm(x, groups, weight, bias).reshape(*shape[:2], -1)
        exact, scale = exact_group_norm_in_40_digits(x, groups, weight, bias)
        error = abs(
            np.array([mpmath.mpf(float(v)) for v in y.ravel()], object).reshape(y.shape) - exact
        ).astype(float)
        worst = np.max(error / (4 * EPS64 * scale))
        assert worst <= 1, f"{shape} / {groups}: {worst:.3g} times the bound"


@both_layouts
def test_a_mean_near_0_of_few_values_of_float64(layout):
    """A pivot that lies well must not cost the values their last bits."""
    for seed in range(50):
        x = np.random.default_rng(seed).integers(-300, 300, (1, 20, 17)).astype(np.float64)
        y = gn_fast.group_norm(in_layout(x, layout), 20, eps=0.0)
        exact, scale = exact_group_norm_in_40_digits(x, 20, np.ones(20), np.zeros(20), eps=0.0)
        scale = np.maximum(scale, abs(exact).astype(float) + 1 / 16)
        error = abs(np.array([mpmath.mpf(float(v)) for v in y.ravel()], object).reshape(y.shape) - exact)
        worst = np.max(error.astype(float) / (4 * EPS64 * scale))
        assert worst <= 1, f"{worst:.3g} times the bound"


# ---- one value, constants, poison ------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 6e4, 1e-30, 3e38])
def test_a_slab_of_one_value_is_the_bias(dtype, value, layout):
    with np.errstate(over="ignore"):
        value = min(dtype.type(value), np.array(6e4, dtype)) if dtype == np.float16 else dtype.type(value)
    x = in_layout(np.full((3, 5, 1, 1), value, dtype), layout)
    bias = np.array([0.3, -0.7, 0, 1e-3, 100]).astype(dtype)
    y = gn_fast.group_norm(x, 5, np.full(5, 7, dtype), bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None, None], x.shape))
    np.testing.assert_array_equal(gn_fast.group_norm(x, 5), np.zeros_like(x))
    y = gn_fast.group_norm(x, 5, bias=bias, activation="relu")
    np.testing.assert_array_equal(y[0, :, 0, 0], np.maximum(bias, 0))


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 0.1, 1e3, 54321.0, 1e-7])
def test_a_constant_slab_is_the_bias_and_with_eps_zero_nan(dtype, value, layout):
    """A mean of equal values is that value, so no error is left to be divided by a small root of eps."""
    for shape in ((2, 4, 3), (2, 4, 17, 13), (1, 6, 2051), (1, 129, 77)):
        x = in_layout(np.full(shape, value).astype(dtype), layout)
        bias = np.arange(shape[1]).astype(dtype)
        m = gn_fast.group_moments(x, 1)
        assert (m.mean == float(x.flat[0])).all(), shape
        assert (m.m2 == 0).all(), shape
        expected = np.broadcast_to(bias.reshape(-1, *(1,) * (x.ndim - 2)), shape)
        np.testing.assert_array_equal(gn_fast.group_norm(x, 1, bias=bias), expected)
        assert np.isnan(gn_fast.group_norm(x, 1, eps=0.0).astype(np.float64)).all(), shape


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_stays_in_its_group_and_sample(dtype, poison, layout):
    rng = np.random.default_rng(0)
    for shape, groups in (((3, 8, 5), 4), ((3, 12, 33, 61), 3), ((2, 1030, 7), 2), ((3, 8), 2)):
        x = in_layout(normal(rng, shape, dtype), layout)
        clean, m_clean = gn_fast.group_norm(x, groups, return_moments=True)
        x[(1, 1, *(-1,) * (x.ndim - 2))] = poison
        y, m = gn_fast.group_norm(x, groups, return_moments=True)
        struck = np.zeros((shape[0], groups), bool)
        struck[1, 0] = True
        assert np.isnan(y.astype(np.float64)[1, : shape[1] // groups]).all()
        spared = np.broadcast_to(~struck[..., None], slabs_of(x, groups).shape).reshape(shape)
        np.testing.assert_array_equal(y[spared], clean[spared])
        np.testing.assert_array_equal(np.isnan(m.m2), struck)
        np.testing.assert_array_equal(np.isnan(m.mean), struck)
        np.testing.assert_array_equal(m.m2[~struck], m_clean.m2[~struck])
        np.testing.assert_array_equal(m.count, m_clean.count)


# ---- the moments -----------------------------------------------------------------------------------------


@every_ratio
@both_layouts
def test_moments_of_float32_spend_no_more_than_the_bound_of_y(ratio, layout):
    """Where xhat = 0 the mean alone may use up 2/16 ulp; m2 counts half in rstd: 4 ulp of it are 2 of y."""
    rng = np.random.default_rng(0)
    for shape, groups in (
        ((2, 6, 5), 3),
        ((2, 6, 33, 61), 2),
        ((1, 130, 257), 2),
        ((1, 1, 65537), 1),
        ((2, 514, 9), 1),
    ):
        x = in_layout(normal(rng, shape, mean=ratio), layout)
        m = gn_fast.group_moments(x, groups)
        mean, deviation, m2 = exact_statistics(x, groups)
        std = np.sqrt(m2 / deviation.shape[-1])
        assert (m.count == deviation.shape[-1]).all()
        assert np.all(np.abs(m.mean - mean) <= 2 / 16 * EPS32 * std), shape
        assert np.all(np.abs(m.m2 - m2) <= 4 * EPS32 * m2), shape


@every_ratio
@both_layouts
def test_moments_of_float64_against_fractions(ratio, layout):
    """As above: 4 ulp of |mean| + std; 8 ulp of m2, which feels the rounding of x - mean by |mean| / std."""
    rng = np.random.default_rng(0)
    for shape, groups in (((1, 4, 251), 2), ((1, 130, 9), 1), ((1, 1, 2113), 1)):
        x = in_layout(normal(rng, shape, np.float64, mean=ratio), layout)
        m = gn_fast.group_moments(x, groups)
        for g, slab in enumerate(slabs_of(x, groups)[0]):
            values = [Fraction(float(v)) for v in slab]
            mean = sum(values) / len(values)
            m2 = sum((v - mean) ** 2 for v in values)
            std = math.sqrt(m2 / len(values))
            assert abs(Fraction(m.mean[0, g]) - mean) <= 4 * EPS64 * (abs(float(mean)) + std)
            assert abs(float(Fraction(m.m2[0, g]) / m2 - 1)) <= 8 * EPS64 * (1 + abs(float(mean)) / std)


NIST = sorted((Path(__file__).parent / "data" / "nist").glob("*.dat"))


@both_layouts
@pytest.mark.parametrize("path", NIST, ids=lambda path: path.stem)
def test_statistics_are_those_certified_by_nist(path, layout):
    lines = path.read_text().splitlines()
    mean, std = (
        float(next(line for line in lines if line.startswith(start)).split(":")[-1].split()[0])
        for start in ("Sample Mean", "Sample Standard Deviation")
    )
    data = lines[next(i for i, line in enumerate(lines) if line.startswith("---")) + 1 :]
    x = np.array([float(line) for line in data if line.strip()])
    m = gn_fast.group_moments(in_layout(np.stack([x, x])[None], layout), 2)
    # The certified values have 15 digits; x is rounded to float64, which moves std by |mean| / std.
    np.testing.assert_allclose(m.mean, mean, rtol=5e-15)
    np.testing.assert_allclose(np.sqrt(m.m2 / (x.size - 1)), std, rtol=5e-15 + 2 * EPS64 * abs(mean) / std)


def test_given_moments_that_counted_nothing_have_no_variance():
    m = gn_fast.Moments(count=[[0]], mean=[[1.0]], m2=[[5.0]])
    y = gn_fast.group_norm(np.array([[1.0, 2.0]]), 1, moments=m, eps=0.25)
    np.testing.assert_array_equal(y, [[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("positions", [1, 3, 20])
def test_without_variance_and_eps_zero_values_are_infinite(dtype, positions):
    x = np.ones((1, 4, positions), dtype)
    y = gn_fast.group_norm(x, 2, np.ones(4), eps=0, mask=np.zeros((1, 1, 1), bool))
    np.testing.assert_array_equal(y.astype(np.float64), np.inf)


@both_layouts
@pytest.mark.parametrize("weight", [9e37, 1.2e38, np.inf])
def test_weights_near_the_largest_float32(weight, layout):
    """The rest of the mean is up to 3% of a standard deviation, whatever it is multiplied by."""
    x = in_layout(normal(np.random.default_rng(0), (1, 1, 64, 64), mean=1e6), layout)
    y = gn_fast.group_norm(x, 1, np.full(1, weight, np.float32))
    ones = gn_fast.group_norm(x, 1)
    if np.isinf(weight):
        apart = np.abs(ones) > 0.1  # from the mean's float32 part, where 0 * inf is NaN
        np.testing.assert_array_equal(y[apart], np.copysign(np.inf, ones[apart]))
    else:
        finite = np.abs(ones) < 2.5
        np.testing.assert_allclose(y[finite], ones[finite] * weight, rtol=1e-6, atol=1e-6 * weight)

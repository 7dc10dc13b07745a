"""Every dtype: all patterns of the 16-bit types in and out, what is promoted, copied or refused."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from helpers import DTYPES, LAYOUTS, LEVELS, assert_same_bits, in_layout, name_of, normal

import gn_fast
from gn_fast import Moments, reference

HALVES = DTYPES[:2]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=name_of)
every_level = pytest.mark.parametrize("level", LEVELS)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def patterns(dtype):
    return np.arange(65536, dtype=np.uint16).view(dtype)


def widened(x, dtype=np.float64):
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return x.astype(dtype)


def scaled(x, weight=None, bias=None, **more):
    """(x - 0) / sqrt(1 + 0) * weight + bias: with given moments the call is nothing but the affine."""
    one = np.ones((x.shape[0], 1))
    return gn_fast.group_norm(
        x, 1, weight, bias, eps=0, moments=Moments(one.astype(int), 0 * one, one), **more
    )


# ---- float16 and bfloat16 --------------------------------------------------------------------------------


@every_half
@every_level
@both_layouts
def test_every_pattern_goes_in_and_out_unchanged(dtype, level, layout):
    for channels in (1, 2, 3, 16, 1024):
        x = in_layout(patterns(dtype)[: 65536 // channels * channels].reshape(1, channels, -1), layout)
        with gn_fast.use_isa(level):
            y = scaled(x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(widened(y), widened(x))


@every_half
@every_level
@both_layouts
def test_every_pattern_widens_exactly(dtype, level, layout):
    """A residual of 16 bits, added to 0."""
    residual = in_layout(np.stack([patterns(dtype), patterns(dtype)[::-1]])[None], layout)
    for wide in (np.float32, np.float64):
        with gn_fast.use_isa(level):
            y = scaled(in_layout(np.zeros(residual.shape, wide), layout), residual=residual)
        np.testing.assert_array_equal(y, widened(residual, wide))


@every_half
@every_level
@both_layouts
@pytest.mark.parametrize("wide", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_every_pattern_widens_exactly_as_weight_or_bias(dtype, level, layout, wide):
    values = patterns(dtype).reshape(64, 1024)
    x = in_layout(np.ones((64, 1024, 2), wide), layout)
    expected = np.repeat(widened(values, wide)[..., None], 2, 2)
    with gn_fast.use_isa(level):
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(scaled(x, bias=values), expected + wide(1))
        finite = ~np.isinf(expected)
        np.testing.assert_array_equal(scaled(x, values)[finite], expected[finite])


@both_layouts
def test_an_infinite_weight_gives_infinity(layout):
    x = in_layout(np.array([[[2.0, -2.0, 0.0]]], np.float32), layout)
    np.testing.assert_array_equal(scaled(x, np.array([np.inf])), [[[np.inf, -np.inf, np.nan]]])


@every_half
@every_level
@both_layouts
def test_results_round_once_to_nearest_even(dtype, level, layout):
    """Products of a pattern (11 bits) and one of these weights (13) are exact in float32: many are ties,
    others just beside one, subnormal, or beyond the largest."""
    u = float(ml_dtypes.finfo(dtype).eps)
    weight = [
        1 + u / 2,
        1 - u / 4,
        1 + u / 4,
        1.5,
        3,
        -0.75,
        2**-3 * (1 + u / 2),
        2**-5,
        2**-7,
        0.375,
        2.0,
        1024 + 0.5,
    ]
    weight = np.array(weight, np.float32)
    with np.errstate(all="ignore"):
        values = patterns(dtype).astype(np.float64)
        few = patterns(dtype)[~(np.abs(values) < 2.0**-110) & ~(np.abs(values) > 2.0**110)]  # else not exact
        x = in_layout(np.broadcast_to(few, (1, weight.size, few.size)), layout)
        product = x.astype(np.float32) * weight[:, None]
        np.testing.assert_array_equal(product, x.astype(np.float64) * weight[:, None].astype(np.float64))
        expected = product.astype(dtype)
    with gn_fast.use_isa(level):
        y = scaled(x, weight)
    np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))


@every_half
@every_level
def test_nan_stays_nan_and_overflow_becomes_inf(dtype, level):
    big = ml_dtypes.finfo(dtype).max
    x = np.array([big, -big, np.inf, -np.inf, np.nan, 0], dtype).reshape(1, 1, -1)
    with gn_fast.use_isa(level):
        y = scaled(x, np.array([1.125], np.float32)).ravel().astype(np.float64)
    np.testing.assert_array_equal(y, [np.inf, -np.inf, np.inf, -np.inf, np.nan, 0])


def test_bfloat16_is_known_by_its_dtype():
    x = normal(np.random.default_rng(0), (2, 4, 5), ml_dtypes.bfloat16)
    y, m = gn_fast.group_norm(x, 2, return_moments=True)
    assert y.dtype == ml_dtypes.bfloat16
    assert (m.count.dtype, m.mean.dtype, m.m2.dtype) == (np.int64, np.float64, np.float64)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4], ids=lambda d: d.__name__
)
def test_other_small_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"^x must.*{np.dtype(dtype).name}"):
        gn_fast.group_norm(np.zeros((2, 4), dtype), 2)


# ---- promoted, swapped, misaligned -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", ">i4", ">u2"])
def test_integers_and_bools_are_promoted_to_float64(dtype):
    x = np.random.default_rng(0).integers(0, 100, (2, 6, 5, 4)).astype(dtype)
    y, m = gn_fast.group_norm(x, 3, return_moments=True)
    assert y.dtype == np.float64
    expected, m_expected = gn_fast.group_norm(x.astype(np.float64), 3, return_moments=True)
    assert_same_bits(y, expected)
    assert_same_bits(m.m2, m_expected.m2)
    assert gn_fast.group_norm(np.moveaxis(x, 1, -1), 3, axis=-1).dtype == np.float64


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_big_endian_arrays_are_read_and_written(dtype):
    rng = np.random.default_rng(0)
    native = np.dtype(dtype).newbyteorder("=")
    x, residual = rng.standard_normal((2, 2, 6, 7)).astype(native)
    weight, bias = rng.standard_normal((2, 6)).astype(native)
    expected = gn_fast.group_norm(x, 3, weight, bias, residual=residual)
    swapped = [a.astype(dtype) for a in (x, weight, bias, residual)]
    y = gn_fast.group_norm(swapped[0], 3, swapped[1], swapped[2], residual=swapped[3])
    assert y.dtype == native
    assert_same_bits(y, expected)
    assert_same_bits(gn_fast.group_moments(swapped[0], 3).m2, gn_fast.group_moments(x, 3).m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_every_argument_may_lie_at_an_odd_address(dtype, name):
    rng = np.random.default_rng(0)
    arguments = {"x": normal(rng, (2, 6, 7), dtype), "weight": normal(rng, 6, dtype)}
    arguments |= {"bias": normal(rng, (2, 6), dtype), "residual": normal(rng, (2, 6, 7), dtype)}
    expected = gn_fast.group_norm(num_groups=2, **arguments)
    value = arguments[name]
    odd = np.zeros(value.nbytes + 1, np.uint8)[1:].view(dtype).reshape(value.shape)
    odd[...] = value
    assert_same_bits(gn_fast.group_norm(num_groups=2, **(arguments | {name: odd})), expected)


# ---- array-likes and subclasses --------------------------------------------------------------------------


def test_lists_tuples_and_array_likes_are_taken():
    class ArrayLike:
        def __array__(self, dtype=None, copy=None):
            return np.array(rows, dtype)

    rows = [[1.0, 3.0, 10.0, 30.0], [2.0, 4.0, 0.0, 1.0]]
    expected = gn_fast.group_norm(np.array(rows), 2)
    for x in (
        rows,
        tuple(map(tuple, rows)),
        [np.array(r) for r in rows],
        ArrayLike(),
        memoryview(np.array(rows)),
    ):
        y = gn_fast.group_norm(x, 2)
        assert type(y) is np.ndarray
        assert_same_bits(y, expected)
        assert_same_bits(gn_fast.group_moments(x, 2).mean, gn_fast.group_moments(np.array(rows), 2).mean)


def test_a_matrix_is_an_array():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        x = np.asmatrix(np.arange(24.0).reshape(4, 6))
        y = gn_fast.group_norm(x, 3, out=np.empty((4, 6)))
        assert_same_bits(y, gn_fast.group_norm(np.asarray(x), 3))
        assert_same_bits(np.asarray(gn_fast.group_norm(x, 3)), y)


def test_a_subclass_comes_back_as_one():
    class Tagged(np.ndarray):
        pass

    x = np.random.default_rng(0).standard_normal((2, 6, 5)).view(Tagged)
    y = gn_fast.group_norm(x, 3)
    assert type(y) is type(np.add(x, x))
    assert_same_bits(np.asarray(y), gn_fast.group_norm(np.asarray(x), 3))


def test_memory_maps_are_read_and_written(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 6, 50)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = gn_fast.group_norm(x, 3)
    assert_same_bits(np.asarray(gn_fast.group_norm(mapped, 3)), expected)
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", shape=x.shape)
    assert gn_fast.group_norm(mapped, 3, out=out) is out
    out.flush()
    assert_same_bits(np.fromfile(tmp_path / "y.bin", np.float32).reshape(x.shape), expected)


@pytest.mark.parametrize("masked", [False, True, np.ma.nomask])
def test_masked_arrays_are_pointed_to_the_mask_argument(masked):
    x = np.ma.masked_array(np.ones((2, 4)), mask=masked)
    for function in (gn_fast.group_norm, gn_fast.group_moments):
        with pytest.raises(TypeError, match=r"^x must.*mask="):
            function(x, 2)


# ---- parameters of another dtype -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("other", [*DTYPES, np.dtype("i4"), np.dtype("?"), np.dtype(">f8")], ids=name_of)
@both_layouts
def test_parameters_may_have_any_float_dtype(dtype, other, layout):
    """Values that every dtype holds: the result must be that of parameters in float64."""
    rng = np.random.default_rng(0)
    x = in_layout(normal(rng, (2, 6, 35), dtype), layout)
    weight, bias, residual = (rng.integers(0, 2, s).astype(np.float64) for s in (6, (2, 6), (2, 6, 35)))
    expected = gn_fast.group_norm(x, 3, weight, bias, residual=residual)
    y = gn_fast.group_norm(x, 3, weight.astype(other), bias.astype(other), residual=residual.astype(other))
    assert y.dtype == dtype
    assert_same_bits(y, expected)


def test_weights_keep_the_digits_of_float64():
    """A float64 x takes all of a float64 weight, and a float32 weight as it is."""
    x = np.random.default_rng(0).standard_normal((2, 4, 9))
    for dtype in (np.float64, np.float32):
        weight = np.array([1 / 3, 2 / 3, 1e10 / 7, 1e-10 / 7], dtype)
        np.testing.assert_allclose(
            gn_fast.group_norm(x, 2, weight), reference.group_norm(x, 2, weight), rtol=1e-13
        )

"""The cases that other libraries test group normalization with, computed exactly or as they print them."""

import itertools

import numpy as np
import pytest
from helpers import EPS32, assert_within_bound, exact_group_norm, in_layout, normal

import gn_fast

# ---- ONNX: the two node tests of GroupNormalization ------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-2], ids=["example", "epsilon"])
def test_onnx(eps):
    rng = np.random.RandomState(0)
    x = rng.randn(3, 4, 2, 2).astype(np.float32)
    scale, bias = rng.randn(4).astype(np.float32), rng.randn(4).astype(np.float32)
    y = gn_fast.group_norm(x, 2, scale, bias, eps)
    assert_within_bound(y, x, 2, scale, bias, eps)
    # ONNX's own definition, at its tolerance.
    grouped = x.reshape(3, 2, 2, 2, 2)
    mean, var = grouped.mean((2, 3, 4), keepdims=True), grouped.var((2, 3, 4), keepdims=True)
    normalized = ((grouped - mean) / np.sqrt(var + eps)).reshape(x.shape)
    expected = scale.reshape(1, 4, 1, 1) * normalized + bias.reshape(1, 4, 1, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-7)


# ---- Keras: the worked examples of GroupNormalization, whose eps is 1e-3 ---------------------------------

ONE_ROW = [[-1.0, -1.0, 1.0, 1.0, 2.0, 2.0, 0, -2.0]]
TWO_ROWS = [[[-1.0, -1.0, 2.0, 2.0], [1.0, 1.0, 0, -2.0]]]
KERAS = [
    (ONE_ROW, 1, -1, [[-0.898, -0.898, 0.539, 0.539, 1.257, 1.257, -0.180, -1.616]]),
    (ONE_ROW, 2, 1, [[-1.0, -1.0, 1.0, 1.0, 0.904, 0.904, -0.301, -1.507]]),
    (TWO_ROWS, 1, -1, [[[-0.898, -0.898, 1.257, 1.257], [0.539, 0.539, -0.180, -1.616]]]),
    (TWO_ROWS, 2, 2, [[[-1.0, -1.0, 0.904, 0.904], [1.0, 1.0, -0.301, -1.507]]]),
    ([[[-1.0, 1.0, 0, 2.0], [1.0, 3.0, -4, -2.0]]], 4, 2, [[[-1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]]]),
    (
        np.arange(16.0).reshape(1, 4, 2, 2),
        2,
        1,
        np.tile(
            [[[-1.5274, -1.0910], [-0.6546, -0.2182]], [[0.2182, 0.6546], [1.0910, 1.5274]]], (1, 2, 1, 1)
        ),
    ),
]


@pytest.mark.parametrize(("x", "groups", "axis", "expected"), KERAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keras(x, groups, axis, expected, dtype):
    x = np.asarray(x, dtype)
    y = gn_fast.group_norm(x, groups, axis=axis, eps=1e-3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3)  # three digits are printed


# ---- PyTorch: test_nn, the sample inputs of its operator tests, and the documentation --------------------

PYTORCH = [
    ((1, 2, 3, 4), 2, 0.0),
    ((2, 3, 10), 3, 0.0),
    ((3, 1, 1, 1, 2), 1, 0.0),
    ((2, 6, 4, 2, 2), 3, 0.0),
    ((1, 256, 1, 1), 32, 0.0),
    ((1, 6, 3), 2, 0.5),
    ((2, 6, 3), 2, 0.5),
    ((1, 3), 1, 1e-5),
    ((0, 2), 1, 1e-5),
    ((5, 5, 5), 1, 0.5),
    ((20, 6, 10, 10), 3, 1e-5),
    ((20, 6, 10, 10), 6, 1e-5),
    ((20, 6, 10, 10), 1, 1e-5),
    ((4, 6, 28, 28), 2, 1e-3),
]


@pytest.mark.parametrize(("shape", "groups", "eps"), PYTORCH)
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_pytorch(shape, groups, eps, layout):
    rng = np.random.default_rng(0)
    x = in_layout(rng.uniform(0, 10, shape).astype(np.float32), layout)
    weight, bias = rng.uniform(0.2, 2, (2, shape[1])).astype(np.float32)
    for w, b in itertools.product((weight, None), (bias, None)):
        y = gn_fast.group_norm(x, groups, w, b, eps)
        assert_within_bound(y, x, groups, w, b, eps)
    if eps == 0:
        # 2 ulp of each of these values, none beyond the largest |xhat| there is.
        slabs = gn_fast.group_norm(x, groups, eps=0).reshape(shape[0], groups, -1).astype(np.float64)
        slack = 4 * EPS32 * (np.abs(slabs).max() + 1)
        np.testing.assert_allclose(slabs.mean(-1), 0, rtol=0, atol=slack)
        np.testing.assert_allclose(slabs.var(-1), 1, rtol=2 * slack)


def test_pytorch_refuses_what_it_refuses():
    with pytest.raises(ValueError, match=r"^num_groups"):
        gn_fast.group_norm(np.zeros((2, 7, 4)), 2)
    with pytest.raises(ValueError, match=r"^x must"):
        gn_fast.group_norm(np.zeros(1), 1)
    for shape, groups in (((1, 2, 3, 4), 3), ((2, 3, 10), 2), ((3, 1, 1, 1, 2), 10), ((2, 6, 4, 2, 2), 4)):
        with pytest.raises(ValueError, match=r"^num_groups"):
            gn_fast.group_norm(np.zeros(shape), groups)


def test_a_zero_stride_batch_of_one_as_pytorch_makes_it():
    """PyTorch gives a size of 1 any stride; so does NumPy, and neither may be read through it."""
    x = normal(np.random.default_rng(0), (1, 256, 1, 1))
    odd = np.lib.stride_tricks.as_strided(x, x.shape, (2**40, 4, 2**41, -(2**42)))
    np.testing.assert_array_equal(gn_fast.group_norm(odd, 32), gn_fast.group_norm(x, 32))


@pytest.mark.parametrize(("shape", "groups", "eps"), PYTORCH)
def test_torch_agrees(shape, groups, eps):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float64)
    weight, bias = rng.standard_normal((2, shape[1]))
    y = gn_fast.group_norm(x, groups, weight, bias, eps)
    arguments = [torch.from_numpy(a) for a in (x, weight, bias)]
    expected = torch.nn.functional.group_norm(arguments[0], groups, *arguments[1:], eps).numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


# ---- Flax, MLX, ncnn, oneDNN -----------------------------------------------------------------------------


def test_flax():
    rng = np.random.default_rng(0)
    x = normal(rng, (2, 5, 4, 4, 32))
    y = gn_fast.group_norm(x, 2, axis=-1)
    assert_within_bound(np.moveaxis(y, -1, 1), np.moveaxis(x, -1, 1), 2)
    with pytest.raises(ValueError, match=r"^num_groups"):
        gn_fast.group_norm(x, 3, axis=-1)


@pytest.mark.parametrize("groups", [1, 7, 11, 77])
def test_flax_masked(groups):
    """Padding of another length for each sample: the statistics are those of what is left."""
    rng = np.random.default_rng(0)
    x = normal(rng, (13, 3, 5, 77), mean=1)
    mask = rng.random((13, 3, 5, 1)) < 0.5
    mask[:, 0, 0] = True
    y, m = gn_fast.group_norm(x, groups, axis=-1, mask=mask, return_moments=True)
    for i in range(13):
        left = x[i][mask[i, ..., 0]].T[None]
        np.testing.assert_array_equal(m.count[i], left.size // groups)
        exact, scale = exact_group_norm(left, groups)
        error = np.abs(y[i][mask[i, ..., 0]].T[None] - exact)
        assert np.all(error <= 2 * EPS32 * scale), i


def test_mlx_grouping_that_is_compatible_with_pytorch():
    """Consecutive channels are a group: these two differ by a factor that is normalized away."""
    x = np.broadcast_to(np.arange(100, dtype=np.float32).reshape(1, 10, 10, 1), (2, 10, 10, 4))
    x = np.concatenate([x, 0.5 * x], axis=-1)
    y = gn_fast.group_norm(x, 2, axis=-1)
    assert_within_bound(np.moveaxis(y, -1, 1), np.moveaxis(x, -1, 1), 2)
    slabs = y.reshape(2, 100, 2, 4).astype(np.float64)
    np.testing.assert_allclose(slabs.mean((1, 3)), 0, atol=4 * EPS32)
    np.testing.assert_allclose(slabs.var((1, 3)), 1, rtol=1e-6)  # less eps / var: 1e-5 / 208


NCNN = [  # (C, *spatial), groups, eps
    ((2, 4, 6, 3), 1, 0.01), ((8, 3, 3, 2), 2, 0.002), ((6, 5, 4, 3), 3, 0.01),
    ((12, 6, 5, 4), 4, 0.02), ((24, 7, 6, 5), 2, 0.001), ((24, 9, 8, 2), 3, 0.0001),
    ((2, 4, 6), 1, 0.01), ((8, 3, 3), 2, 0.002), ((6, 5, 4), 3, 0.01),
    ((12, 6, 5), 4, 0.02), ((24, 7, 6), 2, 0.001), ((24, 9, 8), 3, 0.0001),
    ((2, 24), 1, 0.01), ((8, 23), 2, 0.002), ((6, 25), 3, 0.01),
    ((12, 26), 4, 0.02), ((24, 27), 2, 0.001), ((24, 29), 3, 0.0001),
    ((12,), 1, 0.01), ((18,), 2, 0.002), ((36,), 3, 0.01),
    ((212,), 4, 0.02), ((124,), 2, 0.001), ((324,), 3, 0.0001),
]  # fmt: skip
ONEDNN = [  # the first three normalize each channel by itself
    ((2, 2, 4), 2), ((2, 7, 3, 4), 7), ((2, 5, 9, 1, 10), 5),
    ((2, 2, 4), 1), ((2, 8, 3, 4), 2), ((2, 10, 9, 1, 10), 5),
    ((2, 40, 2, 1, 5), 5), ((2, 80, 2, 1, 5), 5), ((1, 128, 2, 2), 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "groups", "eps"),
    [((1, *shape), groups, eps) for shape, groups, eps in NCNN]
    + [(shape, groups, 1e-5) for shape, groups in ONEDNN],
)
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_shapes_of_ncnn_and_onednn(shape, groups, eps, layout):
    rng = np.random.default_rng(0)
    x = in_layout(rng.uniform(-2, 2, shape).astype(np.float32), layout)
    weight, bias = rng.uniform(-2, 2, (2, shape[1])).astype(np.float32)
    assert_within_bound(gn_fast.group_norm(x, groups, weight, bias, eps), x, groups, weight, bias, eps)
    assert_within_bound(gn_fast.group_norm(x, groups, eps=eps), x, groups, eps=eps)

"""What the tests share: dtypes, memory orders, other processes, and the exact oracle with its bounds.

The oracle here is independent of `gn_fast.reference`: its sums are exact (`math.fsum`), so it stands for the
definition wherever the inputs have at most 24 bits. For float64 inputs it works in 40 digits.
"""

import hashlib
import math
import os
import signal
import subprocess
import sys

import ml_dtypes
import mpmath
import numpy as np
import pytest

import gn_fast

LEVELS = gn_fast.isa_levels()
# Levels that share their bits: x86-64-v2 has no fused multiply-add.
FAMILIES = [family for family in (LEVELS[:1], LEVELS[1:]) if family] if "x86_64_v2" in LEVELS else [LEVELS]
LAYOUTS = ["channels-first", "channels-last"]
RATIOS = [0.0, 1.0, 1e2, 1e4, 1e6]  # |mean| / std
DTYPES = [np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
ACTIVATIONS = [
    None, "relu", "leaky_relu", "hardswish", "silu", "gelu", "gelu_tanh", "mish", "sigmoid", "tanh",
]  # fmt: skip
KINKS = {"relu": [0], "leaky_relu": [0], "hardswish": [-3, 3]}  # where the slope jumps, by at most 1

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")

EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)


def name_of(value):
    """Readable test ids."""
    return str(value)


def in_layout(x, layout):
    """The values of x, of shape (N, C, *spatial), in C order or channels-last in memory, same shape."""
    if layout == "channels-first":
        return np.ascontiguousarray(x)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def normal(rng, shape, dtype=np.float32, mean=0.0):
    return (mean + rng.standard_normal(shape)).astype(dtype)


def far_out(activation, z):
    """What act(z) is for z of the compute type from where it is 0, z or 1 to the last bit, to infinity."""
    below = {"leaky_relu": z.dtype.type(0.01) * z, "tanh": -1}.get(activation, 0)
    return np.where(z > 0, 1 if activation in ("sigmoid", "tanh") else z, below).astype(z.dtype)


def activation_of_pytorch(activation):
    f = pytest.importorskip("torch").nn.functional
    if isinstance(activation, tuple):
        return lambda z: f.leaky_relu(z, activation[1])
    special = {None: lambda z: z, "swish": f.silu, "gelu_tanh": lambda z: f.gelu(z, approximate="tanh")}
    return special.get(activation) or getattr(f, activation)


def works_in_a_fork(work):
    """Whether work() is true in a child, which is killed if it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def fresh_python(code, **environment):
    """What the code does in a fresh interpreter, of our variables with these alone."""
    ours, tools = ("GN_FAST_", "OMP_", "GOMP_"), "OMP_TOOL"  # a sanitizer's, without which it finds what is not
    clean = {k: v for k, v in os.environ.items() if k.startswith(tools) or not k.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def bits_of(a):
    """In C order, with one NaN for all: of two in a sum the compiler chooses whose sign is kept."""
    a = np.ascontiguousarray(a).reshape(-1)
    if a.dtype.kind not in "iub":
        a = np.where(a != a, a.dtype.type(np.nan), a)
    return a.view(f"u{a.dtype.itemsize}")


def digest(arrays):
    """Of the bits of all arrays that are not None."""
    every = b"".join(bits_of(a).tobytes() for a in arrays if a is not None)
    return hashlib.sha256(every).hexdigest()[:16]


def assert_same_bits(a, b, what=""):
    """Equal to the last bit, places of NaNs and signs of zeros too, whatever the memory order."""
    assert a.dtype == b.dtype, what
    assert a.shape == b.shape, what
    differ = np.flatnonzero(bits_of(a) != bits_of(b))
    assert not differ.size, f"{what}: {differ.size} of {a.size} differ, the first at {differ[0]}"


def assert_same_moments(a, b, what=""):
    for field in ("count", "mean", "m2"):
        assert_same_bits(getattr(a, field), getattr(b, field), f"{what} {field}")


# ---- the definition, exactly -----------------------------------------------------------------------------


def slabs_of(values, num_groups):
    n, c, *spatial = values.shape
    return values.reshape(n, num_groups, c // num_groups * math.prod(spatial))


def exact_statistics(x, num_groups):
    """Mean (as a sum of two float64), deviations and m2 of each slab; right to a few 1e-16 relative."""
    slabs = slabs_of(x.astype(np.float64), num_groups)
    mean, rest, m2 = np.zeros((3, *slabs.shape[:2]))
    deviation = np.empty_like(slabs)
    for i in np.ndindex(mean.shape):
        v, d = slabs[i], slabs.shape[-1]
        mean[i] = math.fsum(v) / d
        rest[i] = math.fsum(v - mean[i]) / d  # the deviations are exact or rounded at 2^-53 of themselves
        deviation[i] = (v - mean[i]) - rest[i]
        m2[i] = math.fsum(deviation[i] ** 2)
    return mean, deviation, m2


def per_channel(v, ndim):
    return v.reshape(*v.shape, *(1,) * (ndim - 2)) if v.ndim == 2 else v.reshape(1, -1, *(1,) * (ndim - 2))


def exact_group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    """The exact y of inputs of at most 24 bits, and the scale of its error.

    The scale is |weight| * (|xhat| + 1/16) + |bias|: an element nearer the mean than a sixteenth of the
    standard deviation is measured there.
    """
    _, deviation, m2 = exact_statistics(x, num_groups)
    with np.errstate(all="ignore"):
        rstd = 1 / np.sqrt(m2 / max(deviation.shape[-1], 1) + eps)
        xhat = (deviation * rstd[..., None]).reshape(x.shape)
        w = per_channel(np.ones(x.shape[1]) if weight is None else weight.astype(np.float64), x.ndim)
        b = per_channel(np.zeros(x.shape[1]) if bias is None else bias.astype(np.float64), x.ndim)
        return xhat * w + b, np.abs(w) * (np.abs(xhat) + 1 / 16) + np.abs(b)


def exact_group_norm_in_40_digits(x, num_groups, weight, bias, eps=1e-5):
    """Exact y as mpf objects, and the scale of its error, |mean| * rstd for the 1/16 if more; (N, C, -1)."""
    with mpmath.workdps(40):
        values = x.reshape(*x.shape[:2], -1)
        y, scale = np.empty(values.shape, object), np.empty(values.shape)
        size = x.shape[1] // num_groups
        for n, g in np.ndindex(x.shape[0], num_groups):
            channels = slice(g * size, (g + 1) * size)
            slab = [mpmath.mpf(float(v)) for v in values[n, channels].ravel()]
            mean = mpmath.fsum(slab) / len(slab)
            deviation = [v - mean for v in slab]
            var = mpmath.fsum(d * d for d in deviation) / len(slab)
            rstd = 1 / mpmath.sqrt(var + mpmath.mpf(eps))
            xhat = np.array([d * rstd for d in deviation], object).reshape(size, -1)
            w = np.array([mpmath.mpf(float(v)) for v in weight[channels]], object)[:, None]
            b = np.array([mpmath.mpf(float(v)) for v in bias[channels]], object)[:, None]
            y[n, channels] = xhat * w + b
            offset = max(1 / 16, float(abs(mean) * rstd))
            scale[n, channels] = (abs(xhat).astype(float) + offset) * abs(w).astype(float) + abs(b).astype(
                float
            )
        return y, scale


def spacing(values, dtype):
    """The distance of a dtype's neighbours at these float64 values."""
    info = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(np.abs(values))
    return np.maximum(np.ldexp(float(info.eps), exponent - 1), float(info.smallest_subnormal))


def bound(exact, scale, dtype):
    """How far a result may be from the exact one, for storage narrower than float64.

    float32: 2 ulp at the scale. 16 bits: 1 ulp of the output, or, where it is so near 0 that its ulp is finer
    than float32's at the scale, that error and one rounding to nearest.
    """
    error = 2 * EPS32 * scale
    if dtype == np.float32:
        return error
    return np.maximum(spacing(exact, dtype), error + 0.5 * spacing(np.abs(exact) + error, dtype))


def assert_within_bound(y, x, num_groups, weight=None, bias=None, eps=1e-5, what=""):
    exact, scale = exact_group_norm(x, num_groups, weight, bias, eps)
    error = np.abs(y.astype(np.float64) - exact)
    worst = np.max(error / bound(exact, scale, y.dtype), initial=0.0)
    assert worst <= 1, f"{what or (x.shape, num_groups)}: {worst:.3g} times the bound"

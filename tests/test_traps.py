"""Nothing uninitialised is computed on: of ordinary data nothing is invalid, overflows or divides by zero.

That traps in the calls, and the memory that malloc gives them holds signalling NaNs. A trap kills a
process, so they are made in others, which say what they are about to do.
"""

import ctypes
import itertools
import platform
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, LEVELS, fresh_python, in_layout, normal

import gn_fast
from gn_fast import _core

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="traps of glibc on x86-64"
)

every_level = pytest.mark.parametrize("level", LEVELS)

FE_ALL_EXCEPT = 0x3D
TRAPS = 0x01 | 0x04 | 0x08  # FE_INVALID, FE_DIVBYZERO, FE_OVERFLOW
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
# A signalling NaN of float64; its low half is one of float32, whose halves are ones of float16 and bfloat16.
POISON = np.full(1 << 15, 0x7FF0_7C01_7FA0_7C01, np.uint64)
SIZES = [1 << 15, 1 << 15, *(int(1.1**k) for k in range(108, 51, -1)), *range(128, 0, -1)]

# Runs of 1 to 40 values and some longer; odd numbers of channels; groups below 512 values and above.
SMALL = [
    ((2, channels, run), num_groups)
    for run in (*range(1, 41), 47, 64, 65, 200, 513)
    for channels, num_groups in ((3, 3), (15, 3), (7 * (520 // (2 * run) * 2 + 1), 7))
]
# From 32768 values on, which threads share; a piece has 256 values, a tile 1792, a block 4096, a chunk 65536.
LARGE = [((3, 15, 47, 53), 3), ((1, 1, 150_001), 1), ((1, 5, 40_009), 1), ((1, 21, 83, 41), 7),
         ((2, 515, 7, 9), 5), ((3, 1029, 4, 3), 7), ((33, 1029), 7)]  # fmt: skip


# ---- what the other processes do -------------------------------------------------------------------------


def take_all_from_one_heap():
    """Let malloc map no memory of its own, nor give any back, so that poison() finds it."""
    libc = ctypes.CDLL("libc.so.6")
    assert libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    assert libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    for words in (3, 100, 1000, 10_000, 30_000):
        poison()
        assert np.mean(np.empty(words, np.uint64) == POISON[0]) > 0.9


def poison():
    """Fill what malloc has free, the largest first, and what NumPy keeps of up to 1024 bytes."""
    kept = [POISON[:words].copy() for words in SIZES]
    del kept


def trapped(what, call, *arguments, **options):
    print(call.__name__, what, flush=True)
    poison()
    libm = ctypes.CDLL("libm.so.6")
    libm.feclearexcept(FE_ALL_EXCEPT)
    libm.feenableexcept(TRAPS)
    call(*arguments, **options)
    libm.fedisableexcept(TRAPS)


def most(mask):
    mask.reshape(-1)[3::5] = False


def all_but_one(mask):
    """Nothing of a sample."""
    mask[-1] = False


def each_way(shape, num_groups, dtype, layout, counts=most):
    """Forward and backward: bare; with each activation, parameters and an output; with all that there is."""
    rng = np.random.default_rng(0)
    n, c, *spatial = shape
    x, dy, residual, out = (in_layout(normal(rng, shape, dtype, mean), layout) for mean in (3, 0, 0, 0))
    strided = in_layout(np.zeros((*shape[:-1], 2 * shape[-1]), dtype), layout)[..., ::2]
    some = {"weight": normal(rng, c, dtype), "bias": normal(rng, c, dtype), "out": out}
    every = {"weight": normal(rng, (n, c)), "bias": normal(rng, (n, c)), "out": strided, "residual": residual,
             "mask": np.ones((n, 1, *spatial), bool)}  # fmt: skip
    counts(every["mask"])
    for options, activation in [({}, None), *itertools.product((some, every), ACTIVATIONS)]:
        what = f"{dtype} {layout} {shape} {num_groups} {[*options]} {activation}"
        trapped(what, gn_fast.group_norm, x, num_groups, activation=activation, **options)
        trapped(what, gn_fast.group_norm_backward, dy, x, num_groups, activation=activation, **options)
    m = gn_fast.group_moments(x, num_groups)
    trapped(what, gn_fast.group_moments, x, num_groups)
    trapped(what, gn_fast.group_norm, x, num_groups, moments=m)
    trapped(what, gn_fast.group_norm_backward, dy.astype(np.float64), x, num_groups, moments=m)


def ordinary(problems):
    for dtype, layout, (shape, num_groups) in itertools.product(DTYPES, LAYOUTS, problems):
        each_way(shape, num_groups, dtype, layout)


def shared():
    _core._processors = lambda: 3
    gn_fast.set_num_threads(3)
    ordinary(LARGE)


def nothing_counts():
    for dtype, layout, (shape, num_groups) in itertools.product(DTYPES, LAYOUTS, SMALL[::7] + LARGE):
        each_way(shape, num_groups, dtype, layout, all_but_one)


def constant():
    """rstd is large, so y or dx of values that are not there, taken as 0, would overflow in float16."""
    for dtype, layout, (shape, num_groups) in itertools.product(DTYPES, LAYOUTS, SMALL):
        x = in_layout(np.full(shape, 1000, dtype), layout)
        what = f"{dtype} {layout} {shape} {num_groups}"
        trapped(what, gn_fast.group_norm, x, num_groups)
        trapped(what, gn_fast.group_norm_backward, x, x, num_groups)


def infinite(threads):
    """An infinity in the last sample, whose distance from the mean is invalid."""
    _core._processors = lambda: 3
    x = np.ones((3, 2, 100, 100), np.float32)
    x[-1] = np.inf
    trapped("inf", gn_fast.group_norm, x, 1, num_threads=threads)


# ---- the tests -------------------------------------------------------------------------------------------


def process(call, level=LEVELS[-1]):
    code = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import resource, test_traps
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    test_traps.take_all_from_one_heap()
    test_traps.{call}
    """
    # Outputs come from malloc too.
    result = fresh_python(textwrap.dedent(code), GN_FAST_ISA=level, GN_FAST_POOL_MB="0")
    return result.returncode, result.stdout.splitlines()[-1:], result.stderr


def assert_passes(call, level):
    code, last, errors = process(call, level)
    assert code == 0, f"{level}: signal {-code} in {last} {errors}"


@every_level
def test_ordinary_data_raise_nothing(level):
    assert_passes("ordinary(test_traps.SMALL)", level)


@every_level
def test_nor_do_they_on_any_thread(level):
    assert_passes("shared()", level)


@every_level
def test_nor_where_nothing_counts(level):
    assert_passes("nothing_counts()", level)


@every_level
def test_nor_does_a_constant(level):
    assert_passes("constant()", level)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_invalid_operation_traps(threads):
    """So the tests above would see one, on a worker too."""
    code, last, errors = process(f"infinite({threads})")
    assert (code, last) == (-signal.SIGFPE, ["group_norm inf"]), errors

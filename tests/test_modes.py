"""Every thread computes in the caller's floating-point mode, and afterwards is in its own again.

Modes are what programs set: flush-to-zero and denormals-are-zero for speed, or other directions of rounding.
A thread's own mode is that of the thread that started it.
"""

import contextlib
import ctypes
import itertools
import platform
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import DTYPES, LAYOUTS, LEVELS, digest, fresh_python, in_layout, name_of

import gn_fast

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="fenv_t of glibc on x86-64"
)

BOTH = 0x8040
MODES = {"flush-to-zero": 0x8000, "denormals-are-zero": 0x40, "both": BOTH, "up": 0x4000, "towards 0": 0x6000}
MODE_BITS = 0xFFC0  # of MXCSR: these, and which exceptions trap; the others are the exceptions that occurred
NORMAL = 0x1F80

# From 32768 values on, so that threads share them: units, chunks of one unit, rows, short channels.
SHAPES = [((3, 6, 45, 47), 3), ((1, 2, 183, 181), 1), ((33, 1024), 8), ((3, 1344, 3, 3), 8)]


def libgomp():
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return next((line.split()[-1] for line in lines if "libgomp" in line), None)


class Environment(ctypes.Structure):
    """fenv_t: what the x87 has, and MXCSR."""

    _fields_ = (("x87", ctypes.c_uint32 * 7), ("mxcsr", ctypes.c_uint32))


def mode():
    libm, environment = ctypes.CDLL("libm.so.6"), Environment()
    libm.fegetenv(ctypes.byref(environment))
    return environment.mxcsr & MODE_BITS


def set_mode(bits):
    libm, environment = ctypes.CDLL("libm.so.6"), Environment()
    libm.fegetenv(ctypes.byref(environment))
    environment.mxcsr = bits
    libm.fesetenv(ctypes.byref(environment))


@contextlib.contextmanager
def in_mode(bits):
    set_mode(NORMAL | bits)
    try:
        yield
    finally:
        set_mode(NORMAL)


def problems(dtype, layout):
    """x, dy, the number of groups and a weight, one of which is near the smallest normal number."""
    tiny = float(np.finfo(np.float64 if dtype == np.float64 else np.float32).tiny)
    for shape, num_groups in SHAPES:
        rng = np.random.default_rng(0)
        x, dy = (in_layout(rng.standard_normal(shape).astype(dtype), layout) for _ in range(2))
        weight = rng.standard_normal(shape[1])
        yield x, dy, num_groups, weight * tiny
        yield (x * dtype.type(tiny)).astype(dtype), dy, num_groups, weight
        yield x, (dy * dtype.type(tiny)).astype(dtype), num_groups, weight


def results(dtype, layout, bits=0, threads=1):
    found = []
    for x, dy, num_groups, weight in problems(dtype, layout):
        for activation in (None, "mish"):
            with in_mode(bits):
                same = {"activation": activation, "num_threads": threads}
                y, m = gn_fast.group_norm(x, num_groups, weight, return_moments=True, **same)
                gradients = gn_fast.group_norm_backward(dy, x, num_groups, weight, **same)
                assert mode() == NORMAL | bits, "the caller's mode is left alone"
            found.append(digest([y, m.mean, m.m2, *gradients]))
    return found


def all_results(bits=0, threads=1):
    return [results(*which, bits, threads) for which in itertools.product(DTYPES, LAYOUTS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bits", MODES.values(), ids=MODES.keys())
def test_threads_change_nothing_in_any_mode(three_processors, bits, dtype):
    for level, layout in itertools.product(LEVELS, LAYOUTS):
        with gn_fast.use_isa(level):
            one, two, three = (results(dtype, layout, bits, threads) for threads in (1, 2, 3))
            assert one == two == three, f"{level} {layout}"
            # What is flushed to 0 is 0 in float16 anyway.
            assert dtype == np.float16 or one != results(dtype, layout), "the mode makes no difference"


# ---- in fresh interpreters, whose workers have seen no other mode ------------------------------------------


def process(*steps):
    """The lines that these steps print."""
    code = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from gn_fast import _core
    from test_modes import *
    _core._processors = lambda: 3
    """
    result = fresh_python("\n".join([textwrap.dedent(code), *steps]))
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


NORMALLY = "print(all_results(threads=3))"
FLUSHED = "print(all_results(BOTH, threads=3))"


def test_a_mode_is_that_of_one_call():
    """Neither does it stay, nor do workers that were started in it bring it to other calls."""
    (normal,), (flushed,) = process(NORMALLY), process(FLUSHED)
    assert normal != flushed
    assert process(NORMALLY, FLUSHED, NORMALLY) == [normal, flushed, normal]
    assert process(FLUSHED, NORMALLY, FLUSHED) == [flushed, normal, flushed]


def print_modes(call_in):
    """Of three threads after a call, asked in a parallel region; the caller is back in its normal mode."""
    with in_mode(call_in):
        gn_fast.group_norm(np.ones((3, 8, 64, 64), np.float32), 2, num_threads=3)
    found = []
    ask = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(mode() - NORMAL))
    ctypes.CDLL(libgomp()).GOMP_parallel(ask, None, 3, 0)
    print(*sorted(found))


@pytest.mark.skipif(not libgomp(), reason="asks GCC's OpenMP only")
def test_workers_are_in_their_own_mode_again():
    def modes_after(*calls):
        return process(*(f"print_modes({bits})" for bits in calls))

    assert modes_after(0, BOTH, 0) == ["0 0 0"] * 3
    assert modes_after(BOTH, 0, BOTH) == [f"0 {BOTH} {BOTH}"] * 3

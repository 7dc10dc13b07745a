"""Every thread computes in the caller's floating-point mode: flush-to-zero and denormals-are-zero are carried
to the workers for the call and put back, so that any number of threads gives the same bits in either mode.
"""

import contextlib
import ctypes
import platform

import numpy as np
import pytest
from helpers import LAYOUTS, assert_same_bits, in_layout

import gn_fast

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)

glibc = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
pytestmark = pytest.mark.skipif(not glibc, reason="how the mode is set is glibc's on x86-64")

FLUSH = 0x8040  # of MXCSR: flush-to-zero and denormals-are-zero


def mode():
    """MXCSR without its flags: the last four bytes of glibc's fenv_t of 32."""
    environment = (ctypes.c_uint32 * 8)()
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return environment[7] & 0xFFC0


@contextlib.contextmanager
def flushing():
    libm = ctypes.CDLL("libm.so.6")
    before, flushed = ((ctypes.c_uint32 * 8)() for _ in range(2))
    libm.fegetenv(before)
    ctypes.memmove(flushed, before, 32)
    flushed[7] |= FLUSH
    libm.fesetenv(flushed)
    try:
        yield
    finally:
        libm.fesetenv(before)


def results(x, threads):
    moments = gn_fast.Moments(np.ones((len(x), 4), int), np.zeros((len(x), 4)), np.ones((len(x), 4)))
    with gn_fast.num_threads(threads):
        y = gn_fast.group_norm(x, 4, eps=0.0, moments=moments)
        dx, _, _ = gn_fast.group_norm_backward(x, x, 4, eps=1.0)
        return y, dx, gn_fast.group_norm(x, 4, eps=1e-5, activation="silu")


@both_layouts
@pytest.mark.parametrize("shape", [(8, 8, 67, 41), (1, 8, 300, 200)], ids=str)
def test_any_number_of_threads_gives_the_same_bits_in_either_mode(three_processors, shape, layout):
    tiny = np.random.default_rng(0).uniform(-1e-38, 1e-38, shape).astype(np.float32)  # half of them subnormal
    x = in_layout(tiny, layout)
    kept = results(x, 1)
    with flushing():
        flushed = results(x, 1)
    assert (kept[0] != flushed[0]).any()
    for threads in (2, 3):
        with flushing():
            now = results(x, threads)
            assert mode() & FLUSH == FLUSH
        for a, b in zip(now, flushed, strict=True):
            assert_same_bits(a, b, f"flushed, {threads} threads")
        assert mode() & FLUSH == 0
        for a, b in zip(results(x, threads), kept, strict=True):  # the workers' mode was put back
            assert_same_bits(a, b, f"kept, {threads} threads")

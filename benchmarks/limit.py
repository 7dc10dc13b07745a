"""What a problem takes at least: a copy of its bytes, and the practical limit, two careless sweeps."""

import ctypes
import os
import platform
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import gn_fast

from .problem import EPS, Array, Problem

Call = Callable[[], Any]

# Sums in any order, but not -ffast-math: it would flush subnormal numbers to zero in the whole process.
CARELESS = "-fassociative-math -ffinite-math-only -fno-math-errno -fno-signed-zeros -fno-trapping-math"
FLAGS = ["-O3", "-march=native", *CARELESS.split(), "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
DTYPES = ("float32", "float16", "bfloat16")  # as limit.c numbers them
SMALL = 1 << 20  # bytes that are moved faster by one thread alone than shared


@cache
def library() -> ctypes.CDLL:
    """Compiled in each process anew: it takes a second, and is never stale or another machine's."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "limit.so")
        compiler = shlex.split(os.environ.get("CC", "cc"))
        source = Path(__file__).with_name("limit.c")
        subprocess.run([*compiler, *FLAGS, "-o", path, source, "-lm"], check=True)
        return ctypes.CDLL(str(path))


def _call(function: Any, result: Any, *arguments: Array | int) -> Call:
    """A call with pointers to the arrays, and every number a size_t."""
    converted = []
    for argument in arguments:
        array = isinstance(argument, np.ndarray)
        converted.append(ctypes.c_void_p(argument.ctypes.data) if array else ctypes.c_size_t(argument))

    def call(_arrays: Any = arguments) -> Any:  # which must live as long as their pointers
        function(*converted)
        return result

    return call


def copies(problem: Problem) -> list[Call]:
    """The ways to read x (and dy) and write as many bytes to `out`: plain, past the caches, by one thread.

    Where x (and dy) of a slab are larger than a core's level 2 cache, they are read twice, as
    the statistics must be known before the first value is written.
    """
    dy = problem.dy if problem.mode.backward else 0  # a null pointer
    slab = problem.case.slab_size * problem.x.itemsize
    twice = slab * (1 + problem.mode.backward) > gn_fast.show_config("dicts")["caches"]["level 2"]
    if not twice:
        slab = problem.x.nbytes
    arrays = (problem.out, problem.x, dy, slab, problem.x.nbytes // slab, twice)
    threads = gn_fast.get_num_threads()
    ways = [(False, threads), (True, threads)] + [(False, 1)] * (threads > 1 and problem.x.nbytes <= SMALL)
    return [_call(library().copy, problem.out, *arrays, streamed, threads) for streamed, threads in ways]


def check_copy(problem: Problem, out: Array) -> None:
    """Assert that the bytes have arrived."""
    x, out = (a.view(np.uint8) for a in (problem.x, out))
    assert np.array_equal(out, x ^ problem.dy.view(np.uint8) if problem.mode.backward else x)


def sweeps(problem: Problem) -> list[Call]:
    """The ways of the practical limit, their results y, or dx, dweight and dbias for each sample; or none."""
    mode, x, out, groups = problem.mode, problem.x, problem.out, problem.num_groups
    n, channels, *_ = problem.case.shape
    size, positions, threads = channels // groups, x.size // (n * channels), gn_fast.get_num_threads()
    weight, bias = (a.astype(np.float32) for a in (problem.weight, problem.bias))
    together = threads > 1 and (mode.channels_last or (positions > 1 and size >= threads))
    streamed = positions > 1 and mode.dtype == "float32" and not mode.activation
    ways = list(product([False, True][: 1 + streamed], [False, True][: 1 + together]))
    arguments: tuple[Array | int, ...]
    if mode.channels_last:
        if mode.backward:
            return []
        arguments = (out, x, n, channels, positions, groups, weight, bias)
        return [_call(library().forward_last, out, *arguments, way[1], threads) for way in ways if not way[0]]
    if mode.backward:
        moments = [a.astype(np.float32) for a in (problem.moments.mean, problem.moments.rstd(EPS))]
        sums = np.empty((2, n, channels), np.float32)
        arguments = (out, problem.dy, x, n * groups, size, positions, groups, weight, *moments, *sums)
        return [_call(library().backward, (out, *sums), *arguments, *way, threads) for way in ways]
    if mode.dtype not in DTYPES:
        return []
    kind = (DTYPES.index(mode.dtype), mode.activation == "silu")
    arguments = (out, x, n * groups, size, positions, groups, weight, bias, *kind)
    return [_call(library().forward, out, *arguments, *way, threads) for way in ways]


def check_sweeps(problem: Problem, result: Any) -> None:
    """Assert that the careless result is right."""
    if problem.mode.backward:
        dx, *sums = result
        problem.check((dx, *(a.sum(0) for a in sums)))
    else:
        problem.check((result,))

"""The limit: the bytes that a problem must move, moved by threads that do nothing else, which are limit.c."""

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import gn_fast

from .problem import Array, Problem

FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


@cache
def library() -> ctypes.CDLL:
    """Compiled in each process anew: it takes half a second, and is never stale or another machine's."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "limit.so")
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, *FLAGS, "-o", path, Path(__file__).with_name("limit.c")], check=True)
        return ctypes.CDLL(str(path))


def mover(problem: Problem, streamed: bool, threads: int) -> Callable[[], Array]:
    """A call that reads x (and dy), and writes as many bytes to `out`, past the caches if `streamed`.

    Where x (and dy) of a slab are larger than a core's level 2 cache, they are read twice, as
    the statistics must be known before the first value is written.
    """
    inputs = [problem.x, problem.dy] if problem.mode.backward else [problem.x]
    slab = problem.case.slab_size * problem.x.itemsize
    twice = slab * len(inputs) > gn_fast.show_config("dicts")["caches"]["level 2"]
    if not twice:
        slab = problem.x.nbytes
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (problem.out, *inputs)]
    sizes = [ctypes.c_size_t(slab), ctypes.c_size_t(problem.x.nbytes // slab)]
    arguments = [*pointers, *[None] * (3 - len(pointers)), *sizes, int(twice), int(streamed), threads]
    move = library().move

    def call() -> Array:
        move(*arguments)
        return problem.out

    return call


def check(problem: Problem, out: Array) -> None:
    """Assert that the bytes have arrived."""
    x, out = (a.view(np.uint8) for a in (problem.x, out))
    assert np.array_equal(out, x ^ problem.dy.view(np.uint8) if problem.mode.backward else x)

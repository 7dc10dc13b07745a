"""The stack: no function keeps tiles on it, so that 64 KiB are enough, the caller's and the workers'.

An overflow kills a process or spoils other memory, so the calls are made in processes of their own, and their
results compared with those of one with large stacks.
"""

import itertools
import textwrap
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, LEVELS, digest, fresh_python, in_layout, linux, normal

import gn_fast

pytestmark = linux

SMALL_STACK = 1 << 16

# From 32768 values on, so that there is something to do for workers.
SHAPES = [
    ((2, 6, 45, 67), 3),  # units for everyone
    ((1, 2, 183, 181), 1),  # one unit, shared by its chunks
    ((4, 8448), 11),
    ((3, 1344, 3, 3), 8),
    ((1, 1030, 41), 2),  # groups wider than a tile of channels
]


def variants(shape, dtype, layout):
    """x, dy and options: few and all; strided and of two types; out of float32's range."""
    rng = np.random.default_rng(0)
    n, c, *spatial = shape
    x, dy, residual = (in_layout(normal(rng, shape, dtype), layout) for _ in range(3))
    strided = in_layout(normal(rng, (*shape[:-1], 2 * shape[-1]), dtype), layout)[..., ::2]
    bias, wide = normal(rng, c, dtype), dy.astype(np.float64)
    mask = rng.random((n, 1, *spatial)) < 0.8
    every = {"weight": normal(rng, (n, c)), "bias": bias, "residual": residual, "mask": mask}
    for activation in ACTIVATIONS:
        yield x, dy, {"weight": bias, "activation": activation}
        yield x, dy, {**every, "activation": activation}
        yield strided, wide, {**every, "residual": strided, "activation": activation}
    for far in (1e-40, 5e37):
        if dtype != np.float16:
            yield x * dtype.type(far), dy, {"bias": bias}
        yield x, dy, {"weight": far * rng.standard_normal(c)}
        yield x, wide * far, {**every, "weight": far * rng.standard_normal(c), "activation": "gelu"}


def tasks():
    """Calls, and what they are."""
    for dtype, layout, (shape, num_groups) in itertools.product(DTYPES, LAYOUTS, SHAPES):
        for i, (x, dy, options) in enumerate(variants(shape, dtype, layout)):
            what = f"{dtype} {layout} {shape} variant {i}"
            yield f"{what} forward", partial(gn_fast.group_norm, x, num_groups, **options)
            yield f"{what} backward", partial(gn_fast.group_norm_backward, dy, x, num_groups, **options)


def results(how=lambda call: call()):
    """A digest of what each call returns."""
    for what, call in tasks():
        print(what, end=": ", flush=True)
        result = how(call)
        print(digest(result if isinstance(result, tuple) else [result]))


def in_a_thread(call):
    result = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    thread.join()
    return result[0]


def process(how, level, **environment):
    """The lines that `results` prints in a fresh interpreter."""
    code = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import threading, test_stack
    from gn_fast import _core
    _core._processors = lambda: 3
    """
    result = fresh_python(textwrap.dedent(code) + how, GN_FAST_ISA=level, **environment)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"signal {-result.returncode} in {lines[-1:]} {result.stderr}"
    return lines


@pytest.fixture(scope="module", params=LEVELS)
def level_and_expected(request):
    return request.param, process("test_stack.results()", request.param, GN_FAST_NUM_THREADS="1")


def test_a_callers_stack_may_be_small(level_and_expected):
    level, expected = level_and_expected
    how = f"threading.stack_size({SMALL_STACK})\ntest_stack.results(test_stack.in_a_thread)"
    assert process(how, level, GN_FAST_NUM_THREADS="1") == expected


def test_a_workers_stack_may_be_small(level_and_expected):
    level, expected = level_and_expected
    environment = {"OMP_STACKSIZE": f"{SMALL_STACK}B", "GN_FAST_NUM_THREADS": "3"}
    assert process("test_stack.results()", level, **environment) == expected

"""Threads that call, set, clear and free at once change nothing but speed; without the GIL too."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import FAMILIES, assert_same_bits, fresh_python, normal

import gn_fast
from gn_fast import _core

USED = gn_fast.show_config("dicts")["isa"]["used"]
FAMILY = next(family for family in FAMILIES if USED in family)  # whose bits are the same, whichever a call takes
ROUNDS = 40


@pytest.fixture
def _settings():
    level = gn_fast.show_config("dicts")["isa"]["used"]
    yield
    gn_fast.set_num_threads(None)
    _core._set_isa(level)


@pytest.mark.usefixtures("_settings")
def test_threads_that_call_set_clear_and_free_at_once():
    rng = np.random.default_rng(0)
    inputs = [normal(rng, shape) for shape in ((2, 8, 4), (2, 8, 40, 40), (1, 4, 200, 200))]
    weight = normal(rng, inputs[-1].shape[1])
    with gn_fast.use_isa(FAMILY[0]):
        expected = [(gn_fast.group_norm(x, 2), gn_fast.group_norm_backward(x, x, 2)[0]) for x in inputs]
        scaled = gn_fast.group_norm(inputs[-1], 2, weight)
    shared = [gn_fast.group_norm(x, 2) for x in inputs]  # freed by whoever is last
    start = threading.Barrier(6)

    def call():
        for _ in range(ROUNDS):
            for x, (y, dx) in zip(inputs, expected, strict=True):
                assert_same_bits(gn_fast.group_norm(x, 2), y)
                assert_same_bits(gn_fast.group_norm_backward(x, x, 2)[0], dx)
            assert_same_bits(gn_fast.group_norm(inputs[-1], 2, weight), scaled)

    def settings():
        for i in range(ROUNDS * 10):
            gn_fast.set_num_threads(i % 3 + 1)
            with gn_fast.num_threads(1):
                assert gn_fast.get_num_threads() == 1
            with gn_fast.use_isa(FAMILY[i % len(FAMILY)]):
                assert gn_fast.show_config("dicts")["isa"]["used"] in FAMILY

    def free():
        for i in range(ROUNDS * 10):
            shared[i % len(shared)] = np.positive(gn_fast.group_norm(inputs[i % len(inputs)], 2))
            gn_fast.clear_pool()

    def after_all(work):
        start.wait()
        work()

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(after_all, work) for work in (call, call, settings, settings, free, free)]:
            done.result()


def test_the_gil_is_not_needed():
    """Where there can be none, the import brings none back."""
    result = fresh_python("""
import sys
import numpy
enabled = getattr(sys, "_is_gil_enabled", lambda: True)
before = enabled()
import gn_fast
assert enabled() == before""")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import sys, warnings
import numpy as np
import gn_fast
code = '''
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:] = %r
try:
    import gn_fast
except ImportError:
    pass
else:
    import numpy as np
    assert gn_fast.group_norm(np.ones((1, 2, 3)), 1).sum() == 0
''' % sys.path
other = interpreters.create()
failed = interpreters.run_string(other, code)
assert failed is None, failed
interpreters.destroy(other)
assert gn_fast.group_norm(np.ones((1, 2, 100, 100)), 1).sum() == 0
print("fine")
"""


def test_a_subinterpreter_works_or_cannot_import():
    result = subprocess.run(
        [sys.executable, "-c", SUBINTERPRETER], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "fine\n"

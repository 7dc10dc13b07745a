"""The stack: tiles lie in memory that a call allocates once, so that a thread of 64 KiB of stack, half of
musl's default, can make any call; and so can OpenMP's threads.
"""

import textwrap

import pytest
from helpers import fresh_python, linux

pytestmark = linux

CALLS = textwrap.dedent("""
    import itertools, sys, threading
    import ml_dtypes, numpy as np
    import gn_fast

    def digests():
        rng = np.random.default_rng(0)
        shapes = [((2, 6, 41, 43), 3), ((2, 6, 3, 3), 3), ((40, 1030), 5), ((2, 70, 9, 7), 2)]
        dtypes = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
        found = []
        for (shape, groups), dtype, last in itertools.product(shapes, dtypes, (False, True)):
            x, residual = rng.standard_normal((2, *shape)).astype(dtype)
            if last:
                x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
            mask = rng.random((shape[0], 1, *shape[2:])) < 0.8
            for activation in (None, "relu", "silu", "gelu", "gelu_tanh", "mish"):
                every = {"activation": activation, "residual": residual, "mask": mask}
                for given in ({"activation": activation}, every):
                    calls = [(x, residual), (x[..., ::-1], residual.astype(np.float64))]
                    for x_given, dy in calls:
                        y = gn_fast.group_norm(x_given, groups, **given)
                        found += [y, *gn_fast.group_norm_backward(dy, x_given, groups, **given)]
        for size in (3e38, 1e-40):  # out of float32's range
            x = (size * rng.uniform(-1, 1, (2, 6, 40, 40))).astype(np.float32)
            for array in (x, np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)):
                found.append(gn_fast.group_norm(array, 2, eps=0.0))
        return [a.tobytes() for a in found if a is not None]
""")


def test_a_thread_of_64_kib_of_stack_makes_every_call():
    code = CALLS + textwrap.dedent("""
        expected, found = digests(), []
        threading.stack_size(65536)
        thread = threading.Thread(target=lambda: found.append(digests()))
        thread.start()
        thread.join()
        assert found == [expected]
    """)
    run = fresh_python(code, GN_FAST_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("threads", ["1", "2"])
def test_so_do_threads_of_openmp(threads):
    code = CALLS + "import hashlib; print(hashlib.sha256(b''.join(digests())).hexdigest())"
    small, usual = (
        fresh_python(code, GN_FAST_NUM_THREADS=threads, **given) for given in ({"OMP_STACKSIZE": "64k"}, {})
    )
    assert small.returncode == 0, small.stderr
    assert small.stdout == usual.stdout

"""Nothing is computed that is not asked for, least of all on what memory held before: with floating-point
traps for invalid operations, overflow and division by zero ordinary data pass.
"""

import platform
import textwrap

import pytest
from helpers import LEVELS, fresh_python

glibc = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
pytestmark = pytest.mark.skipif(not glibc, reason="how traps are enabled is glibc's on x86-64")

# A trap ends the process; the last line that it printed tells what it did.
CALLS = textwrap.dedent("""
    import ctypes, itertools, sys
    import ml_dtypes, numpy as np
    import gn_fast

    libm = ctypes.CDLL("libm.so.6")
    TRAPS = 0x01 | 0x04 | 0x08  # FE_INVALID, FE_DIVBYZERO, FE_OVERFLOW

    def trapped(call, *arguments, **options):
        print(call.__name__, arguments[0].shape, arguments[0].dtype, [*options], flush=True)
        libm.feclearexcept(0x3F)
        libm.feenableexcept(TRAPS)
        call(*arguments, **options)
        libm.fedisableexcept(TRAPS)

    rng = np.random.default_rng(0)
    activations = [None, "relu", "silu", "gelu", "gelu_tanh", "mish"]
    cases = [((2, channels, run), groups) for run in (*range(1, 41), 49, 196)
             for channels, groups in ((6, 3), (5, 1), (33, 3))]
    cases += [((3, 15, 47, 53), 3), ((1, 1, 70_001), 1), ((2, 515, 7, 9), 5), ((33, 1029), 7)]
    for i, ((shape, groups), dtype, last) in enumerate(itertools.product(
            cases, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64), (False, True))):
        x, dy, residual = ((2 + rng.standard_normal(shape)).astype(dtype) for _ in range(3))
        if last:
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        each = np.ones(shape[:2], np.float32)
        mask = np.ones((shape[0], 1, *shape[2:]), bool)
        mask[..., ::3] = shape[-1] < 2
        every = {"weight": each, "bias": each, "residual": residual, "mask": mask}
        for options in ({"activation": activations[i // 6 % 6]}, every | {"activation": activations[i % 6]}):
            trapped(gn_fast.group_norm, x, groups, **options)
            trapped(gn_fast.group_norm_backward, dy, x, groups, **options)
""")


@pytest.mark.parametrize("perturbed", ["0", "1", "129"])  # malloc fills memory with this, or not
@pytest.mark.parametrize("level", LEVELS)
def test_ordinary_data_pass_with_traps(level, perturbed):
    run = fresh_python(CALLS, GN_FAST_ISA=level, MALLOC_PERTURB_=perturbed)
    assert run.returncode == 0, run.stdout.splitlines()[-1:] + run.stderr.splitlines()[-1:]
    assert len(run.stdout.splitlines()) > 4000

"""Faults: what is around a call goes wrong, and the call is right, or says what is wrong, and nothing hangs.

The page docs/faults.md is made of the docstrings that have the lines "Provoked:" and "Result:", here and in
the other files: python tests/test_faults.py
"""

import ast
import importlib.util
import itertools
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_bits, forks, fresh_python, linux, normal
from numpy.lib.stride_tricks import as_strided

import gn_fast

ROOT = Path(__file__).parents[1]
SETUP = """
import os, signal, sys, threading
import numpy as np
import gn_fast
x = np.random.default_rng(0).standard_normal((4, 8, 64, 64)).astype(np.float32)
def call(**more): return gn_fast.group_norm(x, 2, activation="gelu", **more)
"""


def python(code, setup=SETUP, **environment):
    """What the code, after the setup, prints in a fresh interpreter, which ends well."""
    result = fresh_python(setup + code, **environment)
    assert result.returncode == 0, result.stderr
    return result


# ---- other libraries -------------------------------------------------------------------------------------

PEERS = {
    "torch": "import torch; torch.ones(300, 300).exp().matmul(torch.ones(300, 300))",
    "sklearn": """import sklearn.cluster
sklearn.cluster.KMeans(2, n_init=1).fit(np.arange(8e3).reshape(-1, 2))""",
    "numba": """import numba
@numba.njit(parallel=True)
def total(a):
    s = 0.0
    for i in numba.prange(a.size):
        s += a[i]
    return s
assert total(np.ones(100_000)) == 100_000""",
}  # fmt: skip
INSTALLED = [name for name in PEERS if importlib.util.find_spec(name)]
ORDERS = list(itertools.permutations(["gn_fast", *INSTALLED]))


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_is_there(peer):
    pytest.importorskip(peer, reason=f"{peer} is not installed: nothing is imported beside it")


@forks
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_other_libraries_with_threads_of_their_own(order):
    """Other libraries have an OpenMP, or threads, of their own in the process.

    Provoked: PyTorch, scikit-learn and Numba, those that are installed, work in parallel before and after
    calls, in every order of imports; then the process is forked.
    Result: the same bits, in the child too.
    """
    ours = "import gn_fast; x = np.arange(2**18, dtype=np.float32).reshape(4, 8, -1) % 1000\n"
    ours += "assert np.array_equal(*(gn_fast.group_norm(x, 2, num_threads=n) for n in (1, 2)))"
    work = "\n".join((PEERS | {"gn_fast": ours})[name] for name in order)
    python(f"{work}\n{work}", "import numpy as np\n")
    python(f"""{work}
import os, signal
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        {ours.splitlines()[1]}
    except BaseException:
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0""", "import numpy as np\n")  # fmt: skip


# ---- the environment -------------------------------------------------------------------------------------

OURS = ["GN_FAST_NUM_THREADS", "GN_FAST_POOL_MB"]
OPENMP = [
    "OMP_NUM_THREADS", "OMP_DYNAMIC", "OMP_SCHEDULE", "OMP_PROC_BIND", "OMP_PLACES", "OMP_STACKSIZE",
    "OMP_WAIT_POLICY", "OMP_THREAD_LIMIT", "OMP_MAX_ACTIVE_LEVELS", "OMP_NESTED", "OMP_CANCELLATION",
    "OMP_DISPLAY_ENV", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "GOMP_STACKSIZE",
]  # fmt: skip
NONSENSE = ["nonsense", "-1", "1.5", "9" * 30, " ", "\xff", "%s%n", "{0}", "1,,2", "x" * 10_000]


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: ascii(text[:40]))
def test_nonsense_in_every_variable(text):
    """Environment variables hold nonsense.

    Provoked: every variable of gn_fast and of OpenMP has the same nonsense, of ten kinds; GN_FAST_ISA alone.
    Result: the same bits; gn_fast names its own variables in warnings and ignores them, and OpenMP its own.
    With an instruction set that there is not, the import fails and names the ones that there are.
    """
    code = "assert np.array_equal(call(), call(num_threads=1))"
    result = python(code, **dict.fromkeys(OURS + OPENMP, text))
    for name in OURS:
        warned = f"RuntimeWarning: {name} must be an integer of at least" in result.stderr
        assert warned != text.isdigit()  # a large number is as good as any
    result = fresh_python(SETUP, GN_FAST_ISA=text)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: GN_FAST_ISA must be one of {', '.join(gn_fast.isa_levels())}, which "
    )


@pytest.mark.parametrize("variable", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true", "OMP_MAX_ACTIVE_LEVELS=0"])
def test_fewer_threads_than_were_asked_for(variable):
    """OpenMP gives fewer threads than a call asks for.

    Provoked: OMP_THREAD_LIMIT=1, OMP_DYNAMIC=true, OMP_MAX_ACTIVE_LEVELS=0.
    Result: those that there are do the work of all; the same bits.
    """
    name, value = variable.split("=")
    python("assert np.array_equal(call(num_threads=2), call(num_threads=1))", **{name: value})


# ---- memory ----------------------------------------------------------------------------------------------


@linux
def test_memory_ends_anywhere_in_a_call():
    """Memory ends in a call.

    Provoked: RLIMIT_AS at 0 to 64 MiB above what is used, for results, scratch, masks and promoted arrays.
    Result: MemoryError with `out` as it was, or the result; afterwards all works.
    """
    python("""
import resource
now = lambda: int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
x = np.random.default_rng(0).standard_normal((2, 16, 700, 701)).astype(np.float32)[..., ::2]
mask = np.ones(x.shape[3], bool)
options = {"num_threads": 1, "mask": mask, "residual": x.astype(np.float16)}
weight = np.ones(16)
y = gn_fast.group_norm(x, 2, weight, **options)
gradients = gn_fast.group_norm_backward(x, x, 2, weight, **options)
del gradients
gn_fast.clear_pool()
out = np.full(x.shape, 7, np.float32)
short = 0
for above in (0, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20):
    for fill in (lambda: gn_fast.group_norm(x, 2, weight, **options, out=out),
                 lambda: gn_fast.group_norm_backward(x, x, 2, weight, **options, out=out)[0]):
        out[...] = 7
        resource.setrlimit(resource.RLIMIT_AS, (now() + above, resource.RLIM_INFINITY))
        try:
            fill()
            gn_fast.group_norm(x, 2, weight, **options)
        except MemoryError:
            short += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert (out == 7).all() or not (out == 7).all(axis=-1).any()
assert short >= 2, short
assert np.array_equal(gn_fast.group_norm(x, 2, weight, **options), y)
""")  # fmt: skip


@linux
def test_the_system_gives_no_more_threads():
    """The system gives no more threads.

    Provoked: RLIMIT_AS, with less left than the stack of a thread.
    Result: a RuntimeWarning; the call runs on one thread; the same bits. Later calls use more as soon as they can.
    """
    code = """
import resource, warnings
expected = call(num_threads=1)
now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 20), resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    assert np.array_equal(call(), expected)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert np.array_equal(call(), expected)
assert [str(w.message)[:38] for w in warned] == refused, warned
"""
    many = gn_fast.show_config("dicts")["threads"]["processors"] > 1 and gn_fast.get_num_threads() > 1
    refusal = ["the system refuses gn_fast 1 more threads"[:38]] if many else []
    python(f"refused = {refusal}" + code)
    python("refused = []" + code, GN_FAST_NUM_THREADS="1")
    python("refused = []" + code, OMP_NUM_THREADS="1")


# ---- ends and interrupts ---------------------------------------------------------------------------------


def test_ctrl_c_in_a_call():
    """Ctrl-C in a call.

    Provoked: SIGINT at any time in a row of calls on two threads, five times.
    Result: the call ends, then KeyboardInterrupt is raised: `out` is whole. The next call works.
    """
    python("""
a = np.random.default_rng(0).standard_normal((4, 8, 256, 256)).astype(np.float32)
b = a[::-1].copy()
whole = [gn_fast.group_norm(v, 2, num_threads=1) for v in (a, b)]
out = whole[0].copy()
interrupts = 0
for i in range(5):
    threading.Timer(0.02 + 0.003 * i, signal.raise_signal, [signal.SIGINT]).start()
    try:
        while True:
            gn_fast.group_norm(b, 2, num_threads=2, out=out)
            gn_fast.group_norm(a, 2, num_threads=2, out=out)
    except KeyboardInterrupt:
        interrupts += 1
    assert any(np.array_equal(out, y) for y in whole)
assert interrupts == 5
""")


def test_the_interpreter_ends_while_threads_compute():
    """The interpreter ends while daemon threads are in calls.

    Provoked: four daemon threads that call all the time, on two threads each, and the main thread returns;
    ten times.
    Result: the process ends at once, with code 0 and without a word.
    """
    for _ in range(10):
        result = python("""
begun = threading.Semaphore(0)
def work():
    while True:
        y, m = call(num_threads=2, return_moments=True)
        begun.release()
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
for _ in range(8):
    begun.acquire()
""")
        assert result.stderr == ""


# ---- sizes -----------------------------------------------------------------------------------------------


def test_a_slab_of_more_than_2_31_values():
    """A slab has more than 2^31 values.

    Provoked: a row of 32,771 values, broadcast 65,537 times.
    Result: count, mean, m2 and the sums of the gradient are those of the row, as many times.
    """
    rng, times = np.random.default_rng(0), 65_537
    row, of_dy = normal(rng, 32_771, np.float32, mean=3), normal(rng, 32_771, np.float32, mean=1)
    x, dy = (np.broadcast_to(v, (1, 1, times, v.size)) for v in (row, of_dy))
    m = gn_fast.group_moments(x, 1)
    values = row.astype(np.float64)
    assert m.count == x.size > 2**31
    # 16 u of what is summed: that of float32 trees, some 10 levels deep.
    near = {"rtol": 16 * 2.0**-24, "atol": 0}
    np.testing.assert_allclose(m.mean, values.mean(), **near)
    np.testing.assert_allclose(m.m2, times * values.var() * values.size, **near)
    s = gn_fast.group_gradient_sums(dy, x, 1, eps=0.0)
    xhat = (values - values.mean()) / values.std()
    np.testing.assert_allclose(s.dbias, times * of_dy.sum(dtype=np.float64), **near)
    most = times * np.abs(of_dy * xhat).sum()
    np.testing.assert_allclose(s.dweight, times * (of_dy * xhat).sum(), rtol=0, atol=near["rtol"] * most)


@linux
@pytest.mark.parametrize("far", range(4))
@pytest.mark.parametrize("sign", [1, -1])
def test_strides_of_more_than_2_31_bytes(far, sign):
    """Values lie more than 2^31 bytes apart.

    Provoked: one stride, of samples, channels or positions, of 2^31 + 64 bytes, forwards and backwards, of
    `x` and of `out`; the memory between is never touched.
    Result: the same bits as of a copy.
    """
    shape, stride = (3, 3, 3, 3), 2**31 + 64
    strides = [0 if d == far else 4 * 4**d for d in range(4)]
    strides[far] = sign * stride
    flags = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    )  # since Python 3.13
    memory = mmap.mmap(-1, 2 * stride + 2**16, flags)

    def view(offset):
        first = np.frombuffer(memory, np.float32, 1, offset + (2 * stride if sign < 0 else 0))
        return as_strided(first, shape, strides, writeable=True)

    x, out = view(0), view(8192)
    x[...] = normal(np.random.default_rng(0), shape)
    copy = np.copy(x, order="K")
    y = gn_fast.group_norm(copy, 3)
    assert gn_fast.group_norm(x, 3, out=out) is out
    assert_same_bits(out, y)
    dx = gn_fast.group_norm_backward(copy, copy, 3)[0]
    assert_same_bits(gn_fast.group_norm_backward(x, x, 3, out=out)[0], dx)
    assert_same_bits(gn_fast.group_moments(x, 3).m2, gn_fast.group_moments(copy, 3).m2)


# ---- the page --------------------------------------------------------------------------------------------

HEAD = """# Faults

What can go wrong around a call, how the tests provoke it, and what happens. The rows are docstrings of tests;
`python tests/test_faults.py` writes this page.

| fault | how it is provoked | what happens | test |
|---|---|---|---|
"""


def rows():
    """Of each test whose docstring tells a fault."""
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text and (
                found := re.fullmatch(r"(.*?)\.\s+Provoked: (.*?)\.\s+Result: (.*?)\.", text, re.DOTALL)
            ):
                yield [" ".join(part.split()) for part in found.groups()] + [f"`{file.name}`, `{node.name}`"]


def page():
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows())


if __name__ == "__main__":
    sys.exit(not (ROOT / "docs/faults.md").write_text(page(), encoding="utf-8"))

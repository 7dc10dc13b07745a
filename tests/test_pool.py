"""The memory of large outputs: it is used again, and bounded, and the arrays are like any other."""

import ctypes
import pickle
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import ACTIVATIONS, assert_same_bits, forks, fresh_python, linux, normal, works_in_a_fork
from numpy._core import multiarray

import gn_fast
from gn_fast import _core

MIB = 1 << 20
OURS, NUMPYS = "gn_fast pool", "default_allocator"
LIMIT = gn_fast.show_config("dicts")["pool"]["limit"]

pytestmark = [
    pytest.mark.skipif(LIMIT < 64 * MIB, reason="no pool here, or a small one"),
    pytest.mark.filterwarnings("ignore:.* multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _empty_pool():
    gn_fast.clear_pool()
    yield
    gn_fast.clear_pool()


def kept():
    return gn_fast.show_config("dicts")["pool"]["kept"]


def place(a):
    return a.__array_interface__["data"][0]


def handler(*array):
    """The name of an array's data-memory handler, or of the one for new arrays."""
    return multiarray.get_handler_name(*array)


def values(kib, seed=0):
    """float32 of so many KiB."""
    return normal(np.random.default_rng(seed), (1, 2, kib * 128))


def fresh(kib):
    return gn_fast.group_norm(values(kib), 2)


def python(code, **environment):
    """What the code, after these helpers, does in a fresh interpreter."""
    helpers = """
import numpy as np, gn_fast, os, sys
def fresh(kib): return gn_fast.group_norm(np.ones((1, 2, kib * 128), np.float32), 2)
def kept(): return gn_fast.show_config("dicts")["pool"]["kept"]
def place(a): return a.__array_interface__["data"][0]
handler, MIB = np._core.multiarray.get_handler_name, 1 << 20
"""
    result = fresh_python(helpers + code, **environment)
    assert result.returncode == 0, result.stderr
    return result


# ---- what comes from the pool ----------------------------------------------------------------------------


def test_every_large_output_does():
    x = values(256)
    outputs = (
        gn_fast.group_norm(x, 2),
        *gn_fast.group_norm(x.astype(np.float16), 2, return_moments=True)[:1],
        *gn_fast.group_norm_backward(x, x, 2, residual=x)[::3],
    )
    assert [handler(y) for y in outputs] == [OURS] * 4
    assert handler() == NUMPYS


def test_small_outputs_are_numpys():
    assert [handler(fresh(kib)) for kib in (1, 127, 128)] == [NUMPYS, NUMPYS, OURS]


def test_a_block_is_used_again():
    for kib in (128, 1000, 5000, 20_000):
        y = fresh(kib)
        before = place(y)
        del y
        assert kept() >= kib << 10
        y = fresh(kib)
        assert place(y) == before
        assert kept() == 0
        del y
        gn_fast.clear_pool()


def test_the_last_freed_is_the_first_used():
    a, b, c = fresh(512), fresh(512), fresh(512)
    places = [place(c), place(a), place(b)]
    del b
    del a
    del c
    results = [fresh(512) for _ in range(3)]
    assert [place(y) for y in results] == places


def test_a_block_is_used_for_what_nearly_fills_it():
    y = fresh(4096)
    before = place(y)
    del y
    for kib, same in ((3700, True), (4096, True), (3400, False), (2048, False), (4097, False)):
        assert (place(fresh(kib)) == before) is same


def test_no_block_is_over_an_eighth_too_large():
    for kib in (128, 129, 200, 1023, 1024, 1025, 3000, 9999):
        y = fresh(kib)
        del y
        assert kib << 10 <= kept() <= (kib << 10) * 9 / 8
        gn_fast.clear_pool()


def test_large_blocks_begin_a_huge_page():
    for kib, alignment in ((128, 64), (2047, 64), (2048, 2 * MIB), (20_001, 2 * MIB)):
        assert place(fresh(kib)) % alignment == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_results_do_not_depend_on_what_was_there(dtype):
    rng = np.random.default_rng(0)
    x, dy, residual = (normal(rng, (2, 8, 61, 150), dtype) for _ in range(3))
    weight, bias = normal(rng, (2, 8)), normal(rng, (2, 8))
    for activation in ACTIVATIONS:
        for order in (x, np.asfortranarray(x), np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)):
            options = {"residual": residual, "activation": activation}
            dirty = [gn_fast.group_norm(x, 2) for _ in range(2)]
            for y in dirty:
                y.fill(np.nan)
            del dirty, y
            y = gn_fast.group_norm(order, 2, weight, bias, **options)
            dx, *_, dresidual = gn_fast.group_norm_backward(dy, order, 2, weight, bias, **options)
            assert {handler(y), handler(dx), handler(dresidual)} == {OURS}
            assert y.strides == order.strides
            out = np.zeros_like(order)
            assert_same_bits(y, gn_fast.group_norm(order, 2, weight, bias, out=out, **options))
            again = gn_fast.group_norm_backward(dy, order, 2, weight, bias, out=out, **options)
            assert_same_bits(dx, out)
            assert_same_bits(dresidual, again[-1])


# ---- how much is kept ------------------------------------------------------------------------------------


def test_never_more_than_the_limit_and_the_oldest_goes_first():
    python("""
arrays = [fresh(1024) for _ in range(7)]
places = [place(y) for y in arrays]
while arrays:
    del arrays[0]
    assert kept() == min(7 - len(arrays), 4) * MIB, kept()
arrays = [fresh(1024) for _ in range(4)]
assert [place(y) for y in arrays] == places[:2:-1]
assert kept() == 0
""", GN_FAST_POOL_MB="4")  # fmt: skip


def test_a_block_beyond_the_limit_goes_and_drives_none_out():
    python("""
small, large = fresh(1024), fresh(5000)
assert handler(large) == "gn_fast pool"
del small
del large
assert kept() == MIB
""", GN_FAST_POOL_MB="4")  # fmt: skip


def test_the_number_of_blocks_is_bounded_too():
    arrays = [fresh(128) for _ in range(300)]
    del arrays
    assert 0 < kept() <= 256 * 128 << 10
    assert len({place(y) for y in [fresh(128) for _ in range(300)]}) == 300


def test_clear_pool_gives_back_what_is_kept_and_nothing_else():
    y, expected = fresh(1024), fresh(1024)
    fresh(4096)
    assert kept() == 4 * MIB
    assert gn_fast.clear_pool() is None
    gn_fast.clear_pool()
    assert kept() == 0
    assert_same_bits(y, expected)
    del y
    assert kept() == MIB


@linux
def test_the_system_gets_it():
    python("""
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
fresh(1000)
before = resident()
y = fresh(40_000)
del y
assert resident() - before > 35 * MIB
gn_fast.clear_pool()
assert resident() - before < 5 * MIB
""")


def test_the_limit_is_256_mib_by_default():
    for environment in ({}, {"GN_FAST_POOL_MB": ""}):
        result = python('print(gn_fast.show_config("dicts")["pool"])', **environment)
        assert result.stdout == f"{{'limit': {256 * MIB}, 'kept': 0}}\n"
        assert result.stderr == ""


def test_zero_turns_the_pool_off():
    result = python("y = fresh(1024); print(handler(y)); del y; print(kept())", GN_FAST_POOL_MB="0")
    assert result.stdout.split() == [NUMPYS, "0"]


def test_any_large_number_is_no_limit():
    code = 'y = fresh(1024); del y; print(kept(), gn_fast.show_config("dicts")["pool"]["limit"])'
    assert python(code, GN_FAST_POOL_MB=str(10**30)).stdout.split() == [str(MIB), str(sys.maxsize)]


@pytest.mark.parametrize("text", ["-1", "much", "1.5", "1e3", "0x10", "64M"])
def test_a_bad_variable_is_named_and_ignored(text):
    result = python('print(gn_fast.show_config("dicts")["pool"]["limit"])', GN_FAST_POOL_MB=text)
    assert int(result.stdout) == 256 * MIB
    assert "RuntimeWarning: GN_FAST_POOL_MB must be an integer of at least 0" in result.stderr
    assert repr(text) in result.stderr


# ---- the arrays are like any other -----------------------------------------------------------------------


def test_an_output_owns_its_memory():
    y = fresh(1024)
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.flags.aligned
    assert y.base is None
    assert type(y) is np.ndarray


@pytest.mark.parametrize("elements", [1, 1000, 30_000, 250_000, 262_143, 262_145, 300_000, 4_000_000])
def test_an_output_can_be_resized(elements):
    y = fresh(1024)
    before = y.ravel().copy()
    y.resize((elements,), refcheck=False)
    common = min(elements, before.size)
    assert_same_bits(y[:common], before[:common])
    assert not y[common:].any()
    assert handler(y) == OURS
    y.resize((before.size,), refcheck=False)
    assert_same_bits(y[:common], before[:common])
    assert not y[common:].any()


def test_an_output_resized_to_nothing_leaves_and_returns():
    y = fresh(1024)
    y.resize((0,), refcheck=False)
    y.resize((1000,), refcheck=False)
    assert not y.any()
    y.resize((0, 7), refcheck=False)
    del y
    assert kept() <= 2 * MIB


def test_a_resized_output_goes_back_whole():
    y = fresh(1024)
    y.resize((2, 131_072 - 8000), refcheck=False)  # fits its block still
    before = place(y)
    del y
    assert kept() == MIB
    assert place(fresh(1024)) == before


def test_an_output_can_be_pickled_and_copied():
    y = fresh(1024)
    for protocol in (2, 5):
        assert_same_bits(pickle.loads(pickle.dumps(y, protocol)), y)
    assert handler(y.copy()) == NUMPYS


def test_a_view_keeps_the_memory():
    y = fresh(1024)
    expected = y[0, 1, ::7].copy()
    view = y[0, 1, ::7]
    del y
    others = [fresh(1024) for _ in range(3)]
    assert_same_bits(view, expected)
    assert not any(np.shares_memory(view, other) for other in others)


def test_tracemalloc_counts_what_is_in_arrays():
    def traced():
        snapshot = tracemalloc.take_snapshot()
        numpys = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        return sum(trace.size for trace in snapshot.filter_traces([numpys]).traces)

    x = values(1000)
    gn_fast.group_norm(x, 2)
    tracemalloc.start()
    try:
        before = traced()
        y = gn_fast.group_norm(x, 2)
        assert traced() - before == y.nbytes
        y.resize((1000,), refcheck=False)
        assert traced() - before == y.nbytes
        del y
        assert kept() > 0
        assert traced() == before
    finally:
        tracemalloc.stop()


def test_subclasses_keep_their_class():
    class Mine(np.ndarray):
        pass

    y = gn_fast.group_norm(values(1024).view(Mine), 2)
    assert type(y) is Mine
    assert_same_bits(np.asarray(y), fresh(1024))


def test_outputs_outlive_the_interpreter():
    """Results outlive the interpreter.

    Provoked: a cycle of objects, sys and NumPy itself hold some as the interpreter ends.
    Result: it ends well.
    """
    python("""
class Late:
    def __init__(self): self.array, self.me = fresh(1024), self
    def __del__(self): self.array = None
late, sys.late = Late(), Late()
np.late = fresh(1024), fresh(50_000)
""")


# ---- threads and forks -----------------------------------------------------------------------------------


def test_any_thread_may_free():
    arrays = [fresh(1024) for _ in range(2)]
    places = {place(y) for y in arrays}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(arrays.clear).result()
    assert kept() == 2 * MIB
    assert {place(y) for y in (fresh(1024), fresh(1024))} <= places


def test_many_threads_at_once():
    sizes = [128, 200, 512, 1024, 1100, 3000]
    expected = {kib: fresh(kib) for kib in sizes}
    inputs = {kib: values(kib) for kib in sizes}
    start = threading.Barrier(6)

    def work(offset):
        start.wait()
        mine = []
        for i in range(60):
            kib = sizes[(offset + i) % len(sizes)]
            mine.append((kib, gn_fast.group_norm(inputs[kib], 2, num_threads=1)))
            if i % 20 == 19:
                gn_fast.clear_pool()
            if len(mine) > 3:
                kib, y = mine.pop(i % 3)
                assert_same_bits(y, expected[kib])
                y.fill(np.nan)
        return mine

    with ThreadPoolExecutor(6) as pool:
        for mine in pool.map(work, range(6)):
            for kib, y in mine:
                assert_same_bits(y, expected[kib])


@pytest.fixture
def crowd():
    """Threads that use the handler without the GIL until the test is over; what they find wrong."""
    ours, done, wrong = handler_in(_core._pool_handler), threading.Event(), []

    def work(byte):
        while not done.is_set():
            block = ours.malloc(None, MIB)
            ctypes.memset(block, byte, 64)
            if ctypes.string_at(block, 64) != bytes([byte]) * 64:
                wrong.append(byte)
            ours.free(None, block, MIB)

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(work, byte) for byte in range(4)]
        yield wrong
        done.set()
        for other in others:
            other.result()


def test_no_two_threads_get_one_block_without_the_gil(crowd):
    x = values(1024)
    expected = gn_fast.group_norm(x, 2)
    for _ in range(100):
        assert_same_bits(gn_fast.group_norm(x, 2), expected)
        gn_fast.clear_pool()
    assert not crowd


@forks
def test_outputs_live_on_in_a_fork_and_nothing_is_kept_there():
    y, expected = fresh(1024), fresh(1024)
    fresh(4096)

    def work():
        nonlocal y
        ok = kept() == 0 and np.array_equal(y, expected) and np.array_equal(fresh(1024), expected)
        gn_fast.clear_pool()
        y.resize((2, 300_000), refcheck=False)
        ok = ok and np.array_equal(y.ravel()[: expected.size], expected.ravel())
        y.fill(7)
        del y
        return ok and kept() > 0

    before = kept()
    assert works_in_a_fork(work)
    assert kept() == before == 4 * MIB
    assert_same_bits(y, expected)


@forks
@pytest.mark.usefixtures("crowd")
def test_a_fork_while_other_threads_allocate():
    """The process is forked while other threads are in the pool.

    Provoked: forks beside threads that take and give back blocks without the GIL.
    Result: the child's pool is not locked.
    """
    x = values(1024)
    expected = gn_fast.group_norm(x, 2)
    for _ in range(50):
        assert works_in_a_fork(lambda: np.array_equal(gn_fast.group_norm(x, 2), expected))


# ---- NumPy's handlers ------------------------------------------------------------------------------------


class Handler(ctypes.Structure):
    """PyDataMem_Handler of NEP 49."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        ("malloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("calloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)),
        ("realloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("free", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
    )


def pointer_in(capsule, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, name)


def handler_in(capsule):
    return Handler.from_address(pointer_in(capsule, b"mem_handler"))


@pytest.fixture
def users_handler():
    """NumPy's functions under another name, set by the user."""
    api = ctypes.cast(pointer_in(multiarray._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(api[304])
    default = ctypes.PYFUNCTYPE(ctypes.py_object)(api[305])()
    copy = Handler.from_buffer_copy(handler_in(default))
    copy.name = b"the user's own"
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = ctypes.create_string_buffer(b"mem_handler")  # the capsule does not copy it
    set_handler(new(ctypes.addressof(copy), name, None))
    yield copy, name
    set_handler(default)


@pytest.mark.usefixtures("users_handler")
def test_a_users_own_handler_comes_first():
    y = fresh(1024)
    assert handler(y) == handler() == "the user's own"
    del y
    assert kept() == 0


def test_a_call_without_memory_leaves_numpys_handler():
    fresh(1024)
    x = np.broadcast_to(np.float32(1), (1, 2, 1 << 50))
    for call in (gn_fast.group_norm, lambda x, g: gn_fast.group_norm_backward(x, x, g)):
        with pytest.raises(MemoryError):
            call(x, 2)
        assert handler() == NUMPYS
    assert handler(np.ones(10**6)) == NUMPYS


@linux
def test_what_is_kept_goes_before_memory_is_said_to_be_short():
    """Memory is short while the pool keeps some.

    Provoked: RLIMIT_AS, with less left than a result needs and more kept.
    Result: what is kept goes back first; MemoryError only where that is not enough, and arrays are as before.
    """
    python("""
import resource
x, y = np.ones((1, 2, 16 << 20), np.float32), fresh(100 * 1024)
del y
now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (now + 64 * MIB, now + 64 * MIB))
y = gn_fast.group_norm(x, 2, num_threads=1)
assert handler(y) == "gn_fast pool" and kept() == 0
try:
    y.resize((4, 2, 16 << 20), refcheck=False)
except MemoryError:
    pass
assert y.shape == x.shape and not y.any()
""")


def test_the_handlers_functions():
    ours = handler_in(_core._pool_handler)
    assert (ours.name, ours.version) == (OURS.encode(), 1)

    def contents(block, size):
        return ctypes.string_at(block, size)

    block = ours.malloc(None, 0)
    assert block
    ours.free(None, block, 12345)
    ours.free(None, None, 1)

    block = ours.malloc(None, MIB)
    ctypes.memset(block, 1, MIB)
    ours.free(None, block, 0)
    assert ours.calloc(None, 1 << 10, 1 << 10) == block
    assert not any(contents(block, MIB))
    assert not ours.calloc(None, 1 << 40, 1 << 40)
    assert not ours.malloc(None, (1 << 64) - 1)

    ctypes.memset(block, 2, MIB)
    assert not ours.realloc(None, block, 1 << 60)
    assert not ours.realloc(None, block, (1 << 64) - 1)
    assert contents(block, MIB) == b"\2" * MIB
    larger = ours.realloc(None, block, 3 * MIB)
    assert contents(larger, MIB) == b"\2" * MIB
    smaller = ours.realloc(None, larger, 1000)
    assert contents(smaller, 1000) == b"\2" * 1000
    ours.free(None, smaller, 7)
    ours.free(None, ours.realloc(None, None, 100), 100)

"""Threads: who may set how many, what the machine allows, and that forks and crowds of threads do no harm.

That the number of threads changes no bit is the promise of test_bits.py.
"""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import assert_same_bits, forks, fresh_python, linux, works_in_a_fork
from threadpoolctl import threadpool_limits

import gn_fast
from gn_fast import _core
from gn_fast.machine import cache_bytes, cpu_quota

THREADS = gn_fast.show_config("dicts")["threads"]
UNLIMITED = sys.maxsize

# Python's advice against forking threads is what the last section is about.
pytestmark = pytest.mark.filterwarnings("ignore:.* multi-threaded, use of fork:DeprecationWarning")

several = pytest.mark.skipif(THREADS["processors"] < 2, reason="one processor, or a build without OpenMP")


def python(code, **environment):
    """What the code prints in a fresh interpreter."""
    result = fresh_python(f"import os, gn_fast\n{code}", **environment)
    assert result.returncode == 0, result.stderr
    return result


def threads_by_default(**environment):
    return int(python("print(gn_fast.get_num_threads())", **environment).stdout)


def large(seed=0):
    """Enough values for a parallel region."""
    return np.random.default_rng(seed).standard_normal((4, 8, 64, 64)).astype(np.float32)


# ---- who sets how many -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _put_back():
    yield
    gn_fast.set_num_threads(None)


def test_all_processors_by_default():
    assert threads_by_default() == THREADS["processors"]


@several
def test_a_number_is_set_for_the_process():
    gn_fast.set_num_threads(1)
    assert gn_fast.get_num_threads() == 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(gn_fast.get_num_threads).result() == 1
    gn_fast.set_num_threads(np.int64(2))
    assert gn_fast.get_num_threads() == 2


def test_none_returns_to_the_default():
    before = gn_fast.get_num_threads()
    gn_fast.set_num_threads(1)
    gn_fast.set_num_threads(None)
    assert gn_fast.get_num_threads() == before


@several
def test_contexts_nest_and_end():
    gn_fast.set_num_threads(2)
    with gn_fast.num_threads(1):
        with gn_fast.num_threads(2):
            assert gn_fast.get_num_threads() == 2
        assert gn_fast.get_num_threads() == 1
        gn_fast.set_num_threads(2)  # the context comes first
        assert gn_fast.get_num_threads() == 1
        with pytest.raises(ZeroDivisionError), gn_fast.num_threads(2):
            raise ZeroDivisionError
        assert gn_fast.get_num_threads() == 1
    assert gn_fast.get_num_threads() == 2


@several
def test_a_context_is_of_one_thread_only():
    gn_fast.set_num_threads(2)
    with gn_fast.num_threads(1), ThreadPoolExecutor(1) as pool:
        assert pool.submit(gn_fast.get_num_threads).result() == 2
        assert gn_fast.get_num_threads() == 1


@several
def test_a_context_is_of_one_task_only():
    async def task(n):
        with gn_fast.num_threads(n):
            await asyncio.sleep(0.01)
            return gn_fast.get_num_threads()

    async def tasks():
        return await asyncio.gather(*map(task, [1, 2, 1, 2]))

    assert asyncio.run(tasks()) == [1, 2, 1, 2]


def test_never_more_than_the_processors():
    for n in (10_000, 10**30):
        with gn_fast.num_threads(n):
            assert gn_fast.get_num_threads() == THREADS["processors"]
        assert_same_bits(gn_fast.group_norm(large(), 2, num_threads=n), gn_fast.group_norm(large(), 2))


@pytest.mark.parametrize("how", [
    gn_fast.set_num_threads,
    lambda n: gn_fast.num_threads(n).__enter__(),
    lambda n: gn_fast.group_norm(large(), 2, num_threads=n),
    lambda n: gn_fast.group_moments(large(), 2, num_threads=n),
], ids=["set_num_threads", "num_threads", "group_norm", "group_moments"])  # fmt: skip
@pytest.mark.parametrize(("n", "error"), [
    (0, ValueError), (-1, ValueError), (True, TypeError), (np.True_, TypeError), (1.0, TypeError),
    ("1", TypeError),
])  # fmt: skip
def test_a_number_that_is_none(how, n, error):
    before = gn_fast.get_num_threads()
    with pytest.raises(error, match=f"^n(um_threads)? must be .* not {n!r}$"):
        how(n)
    assert gn_fast.get_num_threads() == before


@several
@linux
def test_the_argument_starts_that_many():
    code = """
    import numpy as np
    x, tasks = np.ones((4, 8, 64, 64), np.float32), lambda: len(os.listdir("/proc/self/task"))
    before = tasks()
    for call in gn_fast.group_norm, gn_fast.group_moments:
        gn_fast.set_num_threads(2)
        with gn_fast.num_threads(2):
            call(x, 2, num_threads=1)
        print(tasks() - before, end=" ")
    with gn_fast.num_threads(1):
        gn_fast.group_norm(x, 2, num_threads=2)
    print(tasks() - before)
    """.replace("\n    ", "\n")
    assert python(code).stdout.split() == ["0", "0", "1"]


# ---- the environment -------------------------------------------------------------------------------------


@several
def test_the_environment_sets_the_default():
    assert threads_by_default(GN_FAST_NUM_THREADS="1") == 1
    assert threads_by_default(GN_FAST_NUM_THREADS="10000") == THREADS["processors"]
    assert threads_by_default(OMP_NUM_THREADS="1") == 1
    assert threads_by_default(OMP_NUM_THREADS="1", GN_FAST_NUM_THREADS="2") == 2
    code = """gn_fast.set_num_threads(2); print(gn_fast.get_num_threads())
gn_fast.set_num_threads(None); print(gn_fast.get_num_threads())"""
    assert python(code, GN_FAST_NUM_THREADS="1").stdout.split() == ["2", "1"]


def test_an_empty_variable_is_none():
    assert python("print(gn_fast.get_num_threads())", GN_FAST_NUM_THREADS="").stderr == ""


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5", "2,1", "1e3", "0x2"])
def test_a_bad_variable_is_named_and_ignored(text):
    result = python("print(gn_fast.get_num_threads())", GN_FAST_NUM_THREADS=text)
    assert int(result.stdout) == THREADS["processors"]
    assert "RuntimeWarning: GN_FAST_NUM_THREADS" in result.stderr
    assert repr(text) in result.stderr


# ---- without OpenMP --------------------------------------------------------------------------------------


@pytest.fixture
def _openmp_is_missed(monkeypatch):
    """As in a build without it, on a machine of four CPUs."""
    monkeypatch.setattr(_core, "_openmp_is_missed", True)
    monkeypatch.setattr(_core, "_quota", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    for name in ("GN_FAST_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    gn_fast.set_num_threads(None)


@pytest.mark.usefixtures("_openmp_is_missed")
def test_openmp_is_missed_once_where_it_would_help():
    with pytest.warns(RuntimeWarning, match=r"^gn_fast was built without OpenMP and .* 4 CPUs: ") as warned:
        gn_fast.group_norm(large(), 2)
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gn_fast.group_norm(large(), 2)


@pytest.mark.usefixtures("_openmp_is_missed")
def test_openmp_is_not_missed_where_one_thread_is_meant(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gn_fast.group_norm(np.ones((1, 2, 3)), 1)  # too small
        gn_fast.group_norm(large(), 2, num_threads=1)
        with gn_fast.num_threads(1):
            gn_fast.group_norm(large(), 2)
        gn_fast.set_num_threads(1)
        gn_fast.group_norm(large(), 2)
        gn_fast.set_num_threads(None)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        gn_fast.group_norm(large(), 2)
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(_core, "_quota", 1)
        gn_fast.group_norm(large(), 2)


# ---- what the machine allows -----------------------------------------------------------------------------


@several
def test_threadpoolctl_limits_ours():
    """threadpoolctl limits OpenMP.

    Provoked: threadpool_limits(1) and its end.
    Result: one thread inside, as many as before afterwards.
    """
    gn_fast.set_num_threads(None)
    before = gn_fast.get_num_threads()
    with threadpool_limits(1, user_api="openmp"):
        assert gn_fast.get_num_threads() == 1
    assert gn_fast.get_num_threads() == before


@several
@linux
def test_affinity_is_read_afresh():
    """The process may run on one CPU only.

    Provoked: sched_setaffinity after the import, and its end.
    Result: one thread, whatever is asked for, and all again afterwards.
    """
    code = """
everywhere = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(everywhere)})
print(gn_fast.get_num_threads())
with gn_fast.num_threads(2):
    print(gn_fast.get_num_threads())
os.sched_setaffinity(0, everywhere)
print(gn_fast.get_num_threads())"""
    assert python(code).stdout.split() == ["1", "1", str(THREADS["processors"])]


@several
@linux
def test_affinity_is_inherited():
    code = "import gn_fast; print(gn_fast.get_num_threads())"
    cpu = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}}); {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "1\n"


def system(root, files):
    """A file system with these files, each of one line of text or bytes."""
    for name, line in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(line) + b"\n")
    return root


SELF, TREE = "proc/self/cgroup", "sys/fs/cgroup"
V1_SELF = "5:memory:/box\n4:cpu,cpuacct:/box\n3:cpuset:/box"
NAMED = "1:name=systemd:/box\n0::/box"  # both versions at once, the quota in version 1


@pytest.mark.parametrize(("files", "quota"), [
    ({}, UNLIMITED),  # no /proc
    ({SELF: "0::/"}, UNLIMITED),  # no cpu.max: the root, or a controller that is off
    ({SELF: "0::/", f"{TREE}/cpu.max": "max 100000"}, UNLIMITED),
    ({SELF: "0::/", f"{TREE}/cpu.max": "200000 100000"}, 2),
    ({SELF: "0::/", f"{TREE}/cpu.max": "250000 100000"}, 3),  # rounded up
    ({SELF: "0::/", f"{TREE}/cpu.max": "1000 100000"}, 1),
    ({SELF: "0::/", f"{TREE}/cpu.max": "nonsense"}, UNLIMITED),
    ({SELF: "0::/", f"{TREE}/cpu.max": ""}, UNLIMITED),
    ({SELF: "0::/a/b", f"{TREE}/a/b/cpu.max": "400000 100000", f"{TREE}/a/cpu.max": "300000 100000"}, 3),
    ({SELF: "0::/a/b", f"{TREE}/a/b/cpu.max": "200000 100000", f"{TREE}/a/cpu.max": "max 100000"}, 2),
    ({SELF: "0::/a/b", f"{TREE}/a/b/cpu.max": "max 100000", f"{TREE}/a/cpu.max": "100000 50000"}, 2),
    ({SELF: "0::/not/seen/from/here", f"{TREE}/cpu.max": "100000 100000"}, 1),  # a container's own namespace
    ({SELF: "0::/", f"{TREE}/cpu.max": b"\xff\xfe \x80"}, UNLIMITED),
    ({SELF: "0::/", f"{TREE}/cpu.max": "100000 -5"}, UNLIMITED),
    ({SELF: "0::/", f"{TREE}/cpu.max": "100000 0"}, UNLIMITED),
    ({SELF: "0::/", f"{TREE}/cpu.max": "9" * 400 + " 1"}, UNLIMITED),
    ({SELF: b"0::/a\0b", f"{TREE}/cpu.max": "100000 100000"}, 1),
    ({SELF: b"\xff\xff", f"{TREE}/cpu.max": "100000 100000"}, 1),
    ({SELF: b"0::/gn\xff", f"{TREE}/{os.fsdecode(b'gn' + bytes([255]))}/cpu.max": "200000 100000"}, 2),
    ({SELF: "0::/gr\xfc\xdfe", f"{TREE}/gr\xfc\xdfe/cpu.max": "200000 100000"}, 2),
    ({SELF: "0::/with:colon", f"{TREE}/with:colon/cpu.max": "100000 100000"}, 1),
    ({SELF: V1_SELF, f"{TREE}/cpu,cpuacct/box/cpu.cfs_quota_us": "150000",
      f"{TREE}/cpu,cpuacct/box/cpu.cfs_period_us": "100000"}, 2),
    ({SELF: V1_SELF, f"{TREE}/cpu/box/cpu.cfs_quota_us": "300000",
      f"{TREE}/cpu/box/cpu.cfs_period_us": "100000"}, 3),
    ({SELF: V1_SELF, f"{TREE}/cpu,cpuacct/box/cpu.cfs_quota_us": "-1",
      f"{TREE}/cpu,cpuacct/box/cpu.cfs_period_us": "100000"}, UNLIMITED),
    ({SELF: V1_SELF, f"{TREE}/cpu,cpuacct/box/cpu.cfs_quota_us": "150000"}, UNLIMITED),  # no period
    ({SELF: V1_SELF, f"{TREE}/cpu,cpuacct/cpu.cfs_quota_us": "100000",
      f"{TREE}/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1),
    ({SELF: "2:cpuset:/box", f"{TREE}/cpu/box/cpu.cfs_quota_us": "100000",
      f"{TREE}/cpu/box/cpu.cfs_period_us": "100000"}, UNLIMITED),  # cpuset is not cpu
    ({SELF: f"2:cpu:/box\n{NAMED}", f"{TREE}/cpu/box/cpu.cfs_quota_us": "100000",
      f"{TREE}/cpu/box/cpu.cfs_period_us": "50000"}, 2),
])  # fmt: skip
def test_the_cgroup_quota(tmp_path, files, quota):
    """A cgroup's CPU quota is smaller than the machine, or what the system says of it is nonsense.

    Provoked: files of both versions of cgroups, with quotas, without, cut short, negative and no text.
    Result: as many threads as the quota has CPUs, rounded up; nonsense limits nothing.
    """
    assert cpu_quota(system(tmp_path, files)) == quota


def test_this_machines_quota_is_a_number_of_cpus():
    assert 1 <= THREADS["processors"] <= cpu_quota()


CACHE = "sys/devices/system/cpu/cpu0/cache"


def cache(index, level, size):
    level = level if isinstance(level, bytes) else str(level)
    return {f"{CACHE}/index{index}/level": level, f"{CACHE}/index{index}/size": size}


def test_cache_sizes(tmp_path):
    files = cache(0, 1, "48K") | cache(1, 1, "32K") | cache(2, 2, "2048K") | cache(3, 3, "16384K")
    root = system(tmp_path, files)
    assert (cache_bytes(2, root), cache_bytes(3, root)) == (2 << 20, 16 << 20)


@pytest.mark.parametrize(("size", "expected"), [
    ("512K", 512 << 10), ("2M", 2 << 20), ("1G", 1 << 30), ("1048576", 1 << 20),
])  # fmt: skip
def test_cache_sizes_in_other_units(tmp_path, size, expected):
    assert cache_bytes(2, system(tmp_path, cache(0, 2, size))) == expected


NONSENSE = ["0K", "0", "-2048K", "-1", "", "K", "2048KB", "2.5M", "0x80K", "1_0K", "9" * 30 + "K", b"\xffK"]
UNSAID = [
    {}, cache(0, 1, "48K"), cache(0, 2, "unknown"), cache(0, b"\xff", "48K"), {f"{CACHE}/index0/level": "2"},
    *(cache(0, 2, size) | cache(1, 3, size) for size in NONSENSE),
]  # fmt: skip


@pytest.mark.parametrize("files", UNSAID)
def test_cache_sizes_that_the_system_does_not_say(tmp_path, files):
    """The system does not say its caches' sizes.

    Provoked: files that are absent, empty, 0, negative, of other units and no text.
    Result: 1 MiB and 32 MiB; only speed depends on them.
    """
    root = system(tmp_path, files)
    assert (cache_bytes(2, root), cache_bytes(3, root)) == (1 << 20, 32 << 20)


def test_a_cache_that_is_said_after_one_that_is_not(tmp_path):
    assert cache_bytes(3, system(tmp_path, cache(2, 3, "0K") | cache(3, 3, "16M"))) == 16 << 20


def test_the_machine_is_read_in_any_locale(tmp_path):
    """Python decodes text as ASCII here."""
    group = b"gr\xc3\xbc\xff"
    root = system(tmp_path, {SELF: b"0::/" + group, f"{TREE}/{os.fsdecode(group)}/cpu.max": "200000 100000"}
                  | cache(0, 2, b"\xff") | cache(1, 3, "16M"))  # fmt: skip
    code = f"""
from pathlib import Path
from gn_fast.machine import cache_bytes, cpu_quota
root = Path({str(root)!r})
print(cpu_quota(root), cache_bytes(2, root), cache_bytes(3, root), open(os.devnull).encoding)"""
    printed = python(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").stdout.split()
    assert printed[:3] == ["2", str(1 << 20), str(16 << 20)]
    assert printed[3] in ("ANSI_X3.4-1968", "US-ASCII")


# ---- forks and crowds ------------------------------------------------------------------------------------


def on_three_threads(x):
    return gn_fast.group_norm(x, 2, num_threads=3)


@forks
def test_a_fork_after_a_parallel_region_works_on(three_processors):
    """The process is forked after calls on several threads.

    Provoked: forks of it, and a fork of a fork; without a cure, the child waits for threads of OpenMP that it
    does not have.
    Result: parent and child compute on, on several threads, with the same bits.
    """
    x = large()
    expected = on_three_threads(x)

    def work():
        return np.array_equal(on_three_threads(x), expected)

    for _ in range(3):
        assert works_in_a_fork(work)
        assert work()
    assert works_in_a_fork(lambda: work() and works_in_a_fork(work))


@forks
def test_a_fork_while_other_threads_work_does_too(three_processors):
    """The process is forked while other Python threads are in calls.

    Provoked: ten forks beside two threads that call all the time.
    Result: parent and children compute on, with the same bits.
    """
    x = large()
    expected = on_three_threads(x)
    done = threading.Event()

    def work():
        return np.array_equal(on_three_threads(x), expected)

    def keep_working():
        while not done.is_set():
            on_three_threads(x)

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(keep_working) for _ in range(2)]
        try:
            assert all(works_in_a_fork(work) for _ in range(10))
        finally:
            done.set()
        for other in others:
            other.result()


@forks
def test_a_pool_of_forked_processes_works(three_processors):
    """Forked workers of multiprocessing compute.

    Provoked: a pool of two by fork, after calls on several threads in the parent.
    Result: the same bits.
    """
    arrays = [large(seed) for seed in range(4)]
    expected = [on_three_threads(x) for x in arrays]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map_async(on_three_threads, arrays).get(timeout=60)
    for result, y in zip(results, expected, strict=True):
        assert_same_bits(result, y)


def test_many_python_threads_at_once(three_processors):
    """Many Python threads call at once, on several threads each.

    Provoked: eight that start together, 20 calls each, on one to three threads.
    Result: the same bits.
    """
    arrays = [large(seed) for seed in range(8)]
    expected = [gn_fast.group_norm(x, 2, num_threads=1) for x in arrays]
    start = threading.Barrier(len(arrays))

    def work(x):
        start.wait()
        return [gn_fast.group_norm(x, 2, num_threads=1 + i % 3) for i in range(20)]

    with ThreadPoolExecutor(len(arrays)) as pool:
        for results, y in zip(pool.map(work, arrays), expected, strict=True):
            for result in results:
                assert_same_bits(result, y)

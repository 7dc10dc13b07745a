# The one room with threads: how many there may be, and how a job is shared among them.  What a thread does
# depends on positions in the array only, so no result depends on who did it.
#
# The GIL is not needed.  What lives longer than a call is: the settings of this file and of isa.pxi, each one object of
# the module or one word, which is read once and replaced whole; the pool, under its lock (pool.h), which calls had to
# share without the GIL before there was another Python; and what is found out when gn_fast is imported.  A call's plan,
# its scratch and NumPy's handler (a context variable) are its thread's own.

import contextlib
import contextvars
import os
import sys
import warnings

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.string cimport memset

from gn_fast.machine import cache_bytes, cpu_quota

cdef extern from "threads.h" nogil:
    int GN_OPENMP
    int gn_survive_fork()
    bint gn_can_start(int threads)
    unsigned gn_mode()
    unsigned gn_enter_mode(unsigned mode)
    void gn_leave(unsigned mode)
    int omp_get_max_threads()
    int gn_processors()
    void gn_share(int threads, void (*work)(const void *plan, int thread) noexcept nogil, const void *plan)

gn_survive_fork()
omp_get_max_threads()  # libomp takes the processors of its first call for all that there may be
cdef Py_ssize_t L2_BYTES = cache_bytes(2)
cdef Py_ssize_t LAST_LEVEL_BYTES = cache_bytes(3)

cdef enum:
    WORTH_A_THREAD = 1 << 15  # values: there two threads take 7.6 us and one 10.4; below, waking one costs as much


def _thread_count(value, name):
    try:
        count = None if isinstance(value, (bool, np.bool_)) else value.__index__()
    except (AttributeError, TypeError):
        count = None
    if count is None:
        raise TypeError(f"{name} must be an integer of at least 1 or None, not {value!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {count}")
    return count


def _warn(message):
    """A RuntimeWarning at the line outside of gn_fast and of the import system that led here. Frames of compiled code
    do not exist, and skip_file_prefixes not before Python 3.12."""
    frame = sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in ("gn_fast", "importlib"):
        frame = frame.f_back
    warnings.warn_explicit(message, RuntimeWarning, frame.f_code.co_filename, frame.f_lineno,
                           module=frame.f_globals.get("__name__"),
                           registry=frame.f_globals.setdefault("__warningregistry__", {}))


def _integer_of_environment(name, least):
    """An environment variable's integer; None, with a warning, if it is none of at least `least`, or is not set."""
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        value = int(text)
        if value >= least:
            return value
    except ValueError:
        pass
    _warn(f"{name} must be an integer of at least {least}, not {text!r}; it is ignored")
    return None


def _threads_of_environment():
    return _integer_of_environment("GN_FAST_NUM_THREADS", 1)


_process_threads = _threads_of_environment()
_context_threads = contextvars.ContextVar("gn_fast.num_threads", default=None)
_quota = cpu_quota()
_openmp_is_missed = not GN_OPENMP  # until it is said


def _processors():
    """How many CPUs this process may use at once: its affinity, read afresh, and its quota."""
    return min(gn_processors(), _quota)


def get_num_threads():
    """The number of threads that a large enough call uses.

    It is the first of these that is set: ``with num_threads(n)``, :func:`set_num_threads`, the environment
    variable ``GN_FAST_NUM_THREADS``, OpenMP's own setting (``OMP_NUM_THREADS``, threadpoolctl); and never more
    than the CPUs that the process may run on and its cgroup's CPU quota allow.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import gn_fast
    >>> gn_fast.get_num_threads() >= 1
    True
    """
    return _resolve_threads(None)


def _resolve_threads(wanted):
    wanted = wanted or _context_threads.get() or _process_threads or omp_get_max_threads()
    return max(1, min(wanted, _processors()))


def _miss_openmp(wanted):
    """Say once that OpenMP is missing, at the first call that it would have shared among CPUs."""
    global _openmp_is_missed
    cpus = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _quota)
    default = 1 if os.environ.get("OMP_NUM_THREADS") == "1" else cpus
    if min(wanted or _context_threads.get() or _process_threads or default, cpus) > 1:
        _openmp_is_missed = False
        _warn(f"gn_fast was built without OpenMP and runs on one of {cpus} CPUs: install OpenMP (GCC has it; for Clang "
              "it is libomp-dev, on macOS Homebrew's libomp) and build gn_fast again, as docs/building.md tells; if one "
              "is enough, GN_FAST_NUM_THREADS=1 says so")


def set_num_threads(n):
    """Set the number of threads for all later calls of this process.

    Parameters
    ----------
    n : int or None
        At least 1. None returns to the default, which :func:`get_num_threads` describes.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer (a bool is not one), or is less than 1.

    Examples
    --------
    >>> import gn_fast
    >>> gn_fast.set_num_threads(1)
    >>> gn_fast.get_num_threads()
    1
    >>> gn_fast.set_num_threads(None)
    """
    global _process_threads
    _process_threads = _threads_of_environment() if n is None else _thread_count(n, "n")


@contextlib.contextmanager
def num_threads(n):
    """Set the number of threads inside a ``with`` block, for the current thread or asynchronous task only.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer (a bool is not one), or is less than 1.

    Examples
    --------
    >>> import gn_fast
    >>> with gn_fast.num_threads(1):
    ...     gn_fast.get_num_threads()
    1
    """
    token = _context_threads.set(_thread_count(n, "n"))
    try:
        yield
    finally:
        _context_threads.reset(token)


cdef enum:
    MAX_PASSES = 3
    L1_ROOM = 1 << 14  # bytes of x, as many of y and dy
    ROWS_AHEAD = 1 << 14  # bytes: several rows at once are out of the order of memory, so what follows is asked for

cdef struct Plan:
    Job *job
    const Kernel *kernel  # the same from the first decision to the last
    Pass passes[MAX_PASSES]
    int count
    int threads
    unsigned mode  # of floating-point arithmetic, the caller's
    double *found  # of a unit: for each thread those of a batch and one more, or for each chunk
    Py_ssize_t size  # of each
    Py_ssize_t batch  # units that a thread brings to the end of a pass before it begins the next
    char *scratch  # of each thread
    Py_ssize_t scratch_bytes
    char *kept  # dy' of the units at work, of each thread a batch or one that all share; or NULL
    Py_ssize_t kept_bytes  # of each unit, or 0


cdef void work_alone(const void *whole, int thread) noexcept nogil:
    """A thread's share of the units: some units of some blocks of samples."""
    cdef const Plan *plan = <const Plan *> whole
    cdef const Job *job = plan.job
    cdef Py_ssize_t per_sample = job.units // job.N, items = (job.N + job.block - 1) // job.block * per_sample, k, n, stop
    cdef Py_ssize_t first = thread * items // plan.threads, last = (thread + 1) * items // plan.threads, begin, end
    cdef unsigned before = gn_enter_mode(plan.mode)
    cdef Scratch scratch = plan.kernel.scratch_of(job, plan.scratch + thread * plan.scratch_bytes)
    if job.block == 1:  # units in order
        work_on_units(plan, first, last, thread, &scratch)
    else:
        for k in range(first // per_sample, (last + per_sample - 1) // per_sample):
            begin = max(first - k * per_sample, 0)
            end = min(last - k * per_sample, per_sample)
            stop = min((k + 1) * job.block, job.N)
            if end - begin == per_sample:
                work_on_units(plan, k * job.block * per_sample, stop * per_sample, thread, &scratch)
            else:
                for n in range(k * job.block, stop):
                    work_on_units(plan, n * per_sample + begin, n * per_sample + end, thread, &scratch)
    gn_leave(before)


cdef void work_on_units(const Plan *plan, Py_ssize_t first, Py_ssize_t stop, int thread,
                        const Scratch *scratch) noexcept nogil:
    """Units that follow one another, each from its moments to its output while it is in the thread's cache. Small ones
    go through each pass together, as memory is read faster in long runs."""
    cdef double *known = plan.found + thread * (plan.batch + 1) * plan.size
    cdef double *found = known + plan.batch * plan.size
    cdef char *kept = plan.kept + thread * plan.batch * plan.kept_bytes
    cdef Task task = Task(plan.job, 0, 0, NULL, NULL, scratch, NULL)
    cdef Py_ssize_t last, unit
    cdef int i
    while first < stop:
        last = min(first + plan.batch, stop)
        memset(known, 0, (last - first) * plan.size * sizeof(double))
        for i in range(plan.count):
            for unit in range(first, last):
                task.unit = unit
                task.kept = kept + (unit - first) * plan.kept_bytes
                work_on_unit(plan, i, &task, known + (unit - first) * plan.size, found)
        first = last


cdef void work_on_unit(const Plan *plan, int i, Task *task, double *known, double *found) noexcept nogil:
    cdef const Pass *p = &plan.passes[i]
    cdef Py_ssize_t k
    task.chunk = 0
    task.known = task.found = known
    if p.merge != NULL:
        p.stage(task)
        for k in range(1, plan.job.chunks):
            memset(found, 0, plan.size * sizeof(double))
            task.chunk = k
            task.found = found
            p.stage(task)
            p.merge(plan.job, known, found)
    elif p.stage != NULL:
        for k in range(plan.job.chunks - 1, -1, -1):  # backwards: the end is still in the cache
            task.chunk = k
            p.stage(task)
    if p.settle != NULL:
        p.settle(plan.job, task.unit, known, task.scratch)


cdef struct Sweep:  # a pass over the chunks of one unit
    const Plan *plan
    int i
    Py_ssize_t unit


cdef void work_together(const Plan *plan) noexcept nogil:
    """One unit after the other, its chunks shared by the threads."""
    cdef Scratch scratch = plan.kernel.scratch_of(plan.job, plan.scratch)
    cdef Sweep s
    cdef Py_ssize_t unit, k
    cdef int i
    for unit in range(plan.job.units):
        memset(plan.found, 0, plan.job.chunks * plan.size * sizeof(double))
        for i in range(plan.count):
            if plan.passes[i].stage != NULL:
                s = Sweep(plan, i, unit)
                gn_share(plan.threads, sweep, &s)
            if plan.passes[i].merge != NULL:
                for k in range(1, plan.job.chunks):
                    plan.passes[i].merge(plan.job, plan.found, plan.found + k * plan.size)
            if plan.passes[i].settle != NULL:
                plan.passes[i].settle(plan.job, unit, plan.found, &scratch)


cdef void sweep(const void *s, int thread) noexcept nogil:
    """A thread's chunks, every other pass backwards: the end of the last one is still in its cache."""
    cdef const Plan *plan = (<const Sweep *> s).plan
    cdef Py_ssize_t unit = (<const Sweep *> s).unit
    cdef int i = (<const Sweep *> s).i
    cdef Py_ssize_t first = thread * plan.job.chunks // plan.threads, k, chunk
    cdef Py_ssize_t last = (thread + 1) * plan.job.chunks // plan.threads - 1
    cdef unsigned before = gn_enter_mode(plan.mode)
    cdef Scratch scratch = plan.kernel.scratch_of(plan.job, plan.scratch + thread * plan.scratch_bytes)
    cdef Task task = Task(plan.job, unit, 0, plan.found, NULL, &scratch, <void *> plan.kept)
    for k in range(last - first + 1):
        chunk = last - k if i % 2 else first + k
        task.chunk = chunk
        task.found = plan.found + chunk * plan.size
        plan.passes[i].stage(&task)
    gn_leave(before)


cdef bint share_units(Plan *plan, Py_ssize_t unit_bytes) noexcept nogil:
    """Whether threads share each unit: if there are too few, or if one stays in their caches only so. A level 2 cache
    is a core's own, so that shared units may be larger; the last level is shared, so that fewer fit."""
    cdef Job *job = plan.job
    cdef Py_ssize_t shares = (job.N + job.block - 1) // job.block * (job.units // job.N)
    if plan.threads > 1 and job.chunks > 1 and (
            shares < plan.threads
            or L2_BYTES < unit_bytes <= L2_BYTES * plan.threads
            or LAST_LEVEL_BYTES // plan.threads < unit_bytes <= LAST_LEVEL_BYTES):
        return True
    plan.threads = min(plan.threads, shares)
    return False


cdef Py_ssize_t units_together(const Plan *plan, Py_ssize_t unit_bytes) noexcept nogil:
    """How many units a thread takes through each pass together: what stays in a level 1 cache, or if arrays come from
    DRAM, which is read faster in long runs, what stays in level 2."""
    cdef const Job *job = plan.job
    cdef Py_ssize_t arrays = 2 if job.dy.data == NULL else 3
    cdef Py_ssize_t bytes = arrays * job.N * job.C * job.S * job.x.itemsize
    cdef Py_ssize_t room = L2_BYTES // 4 if bytes > LAST_LEVEL_BYTES else L1_ROOM
    return min(job.units, max(1, room // (unit_bytes + plan.size * <Py_ssize_t> sizeof(double))))


cdef Py_ssize_t bytes_ahead(const Plan *plan, Py_ssize_t unit_bytes, bint together) noexcept nogil:
    """How far ahead to ask for memory: for the next units while some are normalized, if x comes from DRAM and the last
    level holds both."""
    cdef const Job *job = plan.job
    cdef Py_ssize_t bytes = job.N * job.C * job.S * job.x.itemsize
    if job.channels_last:
        return ROWS_AHEAD if unit_bytes > L2_BYTES // 2 else 0
    if together or bytes <= LAST_LEVEL_BYTES or 2 * plan.threads * plan.batch * unit_bytes > LAST_LEVEL_BYTES:
        return 0
    return plan.batch * unit_bytes


cdef Py_ssize_t bytes_kept(const Plan *plan, Py_ssize_t at_work) noexcept nogil:
    """Of a unit's dy', which with an activation takes long to make twice, if the last level has room for it and the other
    units at work: a quarter of it, or half where exponentials are made."""
    cdef const Job *job = plan.job
    cdef Py_ssize_t bytes = job.C * job.S * job.N // job.units * (8 if job.work == FLOAT64 else 4)
    cdef Py_ssize_t room = LAST_LEVEL_BYTES // (4 if job.activation in (RELU, LEAKY_RELU, HARDSWISH) else 2)
    if (job.activation == IDENTITY or job.mask.data != NULL or (job.channels_last and job.C > TILE) or plan.count < 2
            or plan.passes[plan.count - 2].stage != plan.kernel.sums.stage):
        return 0
    return bytes if bytes * at_work <= room else 0


cdef int run(Plan *plan, wanted_threads) except -1:
    """Carry the plan out on as many threads as are worth it."""
    cdef Job *job = plan.job
    cdef Py_ssize_t values = job.N * job.C * job.S, unit_bytes, at_work, found
    cdef Py_ssize_t memory
    cdef bint together
    if values == 0:
        return 0
    unit_bytes = values // job.units * job.x.itemsize
    plan.threads = 1
    if values >= WORTH_A_THREAD:
        if _openmp_is_missed and job.units * job.chunks > 1:
            _miss_openmp(wanted_threads)
        plan.threads = min(<Py_ssize_t> _resolve_threads(wanted_threads), job.units * job.chunks)
    together = share_units(plan, unit_bytes)
    if plan.threads > 1 and not gn_can_start(plan.threads):
        _warn(f"the system refuses gn_fast {plan.threads - 1} more threads: this call runs on one, as all do with "
              "GN_FAST_NUM_THREADS=1")
        plan.threads = 1
        together = False
    plan.batch = units_together(plan, unit_bytes)
    job.ahead = bytes_ahead(plan, unit_bytes, together)
    plan.mode = gn_mode()
    plan.scratch_bytes = plan.kernel.scratch_bytes(job)
    found = (job.chunks if together else plan.threads * (plan.batch + 1)) * plan.size * <Py_ssize_t> sizeof(double) + 63 & ~63
    at_work = 1 if together else plan.threads * plan.batch
    plan.kept_bytes = bytes_kept(plan, at_work) + 63 & ~<Py_ssize_t> 63
    plan.scratch = <char *> PyMem_RawMalloc(plan.threads * plan.scratch_bytes + at_work * plan.kept_bytes + found + 64)
    if plan.scratch == NULL:
        raise MemoryError("no memory for what is found of a unit of work")
    memory = <Py_ssize_t> plan.scratch
    plan.found = <double *> (plan.scratch + (-memory & 63))
    plan.scratch = <char *> plan.found + found
    plan.kept = NULL
    if plan.kept_bytes:
        plan.kept = plan.scratch + plan.threads * plan.scratch_bytes
    with nogil:
        if together:
            work_together(plan)
        elif plan.threads == 1:
            work_alone(plan, 0)
        else:
            gn_share(plan.threads, work_alone, plan)
        PyMem_RawFree(<void *> memory)
    return 0

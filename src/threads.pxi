# The one room with threads: how many there may be, and how a job is shared among them.  What a thread does
# depends on positions in the array only, so no result depends on who did it.

import contextlib
import contextvars
import os
import warnings

from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree
from cython.parallel cimport prange
from libc.string cimport memset

from gn_fast.machine import cache_bytes, cpu_quota

cdef extern from "threads.h" nogil:
    int GN_OPENMP
    int gn_survive_fork()
    int omp_get_max_threads()
    int omp_get_num_procs()

gn_survive_fork()
cdef Py_ssize_t L2_BYTES = cache_bytes(2)
cdef Py_ssize_t LAST_LEVEL_BYTES = cache_bytes(3)

cdef enum:
    WORTH_A_THREAD = 1 << 15  # values; a parallel region costs 2 to 5 us, in which one core does about as many


def _thread_count(value, name):
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer of at least 1 or None, not {value!r}")
    count = value.__index__()
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {count}")
    return count


def _threads_of_environment():
    text = os.environ.get("GN_FAST_NUM_THREADS", "")
    if not text:
        return None
    try:
        return _thread_count(int(text), "GN_FAST_NUM_THREADS")
    except ValueError:
        warnings.warn(f"GN_FAST_NUM_THREADS must be an integer of at least 1, not {text!r}; it is ignored",
                      RuntimeWarning, stacklevel=2)
        return None


_process_threads = _threads_of_environment()
_context_threads = contextvars.ContextVar("gn_fast.num_threads", default=None)
_quota = cpu_quota()


def _processors():
    """How many CPUs this process may use at once: its affinity, read afresh, and its quota."""
    return min(omp_get_num_procs(), _quota)


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


cdef struct Plan:
    const Job *job
    Stage moments  # NULL where they are given
    Stage affine  # NULL where only the moments are wanted
    void (*merge)(double *into, const double *other, Py_ssize_t n) noexcept nogil
    int threads
    double *scratch  # moments of a unit's groups: two of them for each thread, or one for each chunk
    Py_ssize_t size  # of each


cdef void exchange(const Job *job, Py_ssize_t unit, double *stats, bint given) noexcept nogil:
    """Between a unit's moments and the caller's (N, G) arrays."""
    cdef Py_ssize_t strips = job.units // job.N, first = unit % strips * job.unit_groups, g, i
    cdef Py_ssize_t n = min(job.unit_groups, job.G - first)
    for g in range(n):
        i = unit // strips * job.G + first + g
        if given:
            stats[COUNT * n + g] = job.count[i]
            stats[PIVOT * n + g] = job.mean[i]
            stats[SHIFT * n + g] = 0
            stats[M2 * n + g] = job.m2[i]
        else:
            job.count[i] = <int64_t> stats[COUNT * n + g]
            job.mean[i] = stats[PIVOT * n + g] + stats[SHIFT * n + g]
            job.m2[i] = stats[M2 * n + g]


cdef void work_alone(const Plan *plan, int thread) noexcept nogil:
    """A thread's share of the units, each from its moments to its output while it is in the thread's cache."""
    cdef const Job *job = plan.job
    cdef double *stats = plan.scratch + 2 * thread * plan.size
    cdef double *more = stats + plan.size
    cdef Py_ssize_t unit, k
    for unit in range(thread * job.units // plan.threads, (thread + 1) * job.units // plan.threads):
        memset(stats, 0, plan.size * sizeof(double))
        if plan.moments == NULL:
            exchange(job, unit, stats, True)
        else:
            plan.moments(job, unit, 0, stats)
            for k in range(1, job.chunks):
                memset(more, 0, plan.size * sizeof(double))
                plan.moments(job, unit, k, more)
                plan.merge(stats, more, groups_of(job, unit))
            if job.mean != NULL:
                exchange(job, unit, stats, False)
        if plan.affine != NULL:
            for k in range(job.chunks - 1, -1, -1):
                plan.affine(job, unit, k, stats)


cdef inline Py_ssize_t groups_of(const Job *job, Py_ssize_t unit) noexcept nogil:
    return min(job.unit_groups, job.G - unit % (job.units // job.N) * job.unit_groups)


cdef void work_together(const Plan *plan) noexcept nogil:
    """One unit after the other, its chunks shared by the threads; each sweeps its own back from their end, which
    is still in its cache."""
    cdef const Job *job = plan.job
    cdef Py_ssize_t unit, k
    cdef int thread
    for unit in range(job.units):
        memset(plan.scratch, 0, job.chunks * plan.size * sizeof(double))
        if plan.moments == NULL:
            exchange(job, unit, plan.scratch, True)
        else:
            for thread in prange(plan.threads, num_threads=plan.threads, schedule="static", chunksize=1):
                sweep(plan, plan.moments, unit, thread, True)
            for k in range(1, job.chunks):
                plan.merge(plan.scratch, plan.scratch + k * plan.size, groups_of(job, unit))
            if job.mean != NULL:
                exchange(job, unit, plan.scratch, False)
        if plan.affine != NULL:
            for thread in prange(plan.threads, num_threads=plan.threads, schedule="static", chunksize=1):
                sweep(plan, plan.affine, unit, thread, False)


cdef void sweep(const Plan *plan, Stage stage, Py_ssize_t unit, int thread, bint forward) noexcept nogil:
    cdef Py_ssize_t first = thread * plan.job.chunks // plan.threads, k
    cdef Py_ssize_t last = (thread + 1) * plan.job.chunks // plan.threads - 1
    for k in range(last - first + 1):
        if forward:
            stage(plan.job, unit, first + k, plan.scratch + (first + k) * plan.size)
        else:
            stage(plan.job, unit, last - k, plan.scratch)


cdef int run(Plan *plan, Py_ssize_t itemsize, wanted_threads) except -1:
    """Carry the plan out on as many threads as are worth it."""
    cdef const Job *job = plan.job
    cdef Py_ssize_t values = job.N * job.C * job.S
    cdef bint together
    cdef int thread
    if values == 0:
        return 0
    plan.threads = 1
    if values >= WORTH_A_THREAD:
        plan.threads = min(<Py_ssize_t> _resolve_threads(wanted_threads), job.units * job.chunks)
    together = plan.threads > 1 and (
        job.units < plan.threads
        or (job.chunks >= plan.threads and values // job.units * itemsize > L2_BYTES))
    plan.size = 4 * job.unit_groups
    plan.scratch = <double *> PyMem_RawCalloc((job.chunks if together else 2 * plan.threads) * plan.size, sizeof(double))
    if plan.scratch == NULL:
        raise MemoryError("no memory for the moments of a unit of work")
    with nogil:
        if together:
            work_together(plan)
        elif plan.threads == 1:
            work_alone(plan, 0)
        else:
            for thread in prange(plan.threads, num_threads=plan.threads, schedule="static", chunksize=1):
                work_alone(plan, thread)
        PyMem_RawFree(plan.scratch)
    return 0

# The kernel: its parts, and the table of passes. A module for one instruction set is a title page that includes this
# file; arguments and threads live in the entry points.
#
#   tile    values where they lie, or gathered in level 1
#   piece   values that are summed in lanes of the compute type before they are added up in float64
#   chunk   the pieces between two places where threads may part
#   unit    some groups of a sample; its chunks are merged in order
#
# All are cut by position alone, so neither threads nor strides nor instruction sets can change a bit.

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport INFINITY, sqrt

include "vector.pxi"
include "tile.pxi"
include "activation.pxi"
include "sums.pxi"
include "moments.pxi"
include "apply.pxi"
include "channels_first.pxi"
include "short.pxi"
include "channels_last.pxi"


# ---- scratch ---------------------------------------------------------------------------------------


cdef Py_ssize_t doubles_of(const Job *job) noexcept nogil:
    """Of Scratch.channels."""
    if job.channels_last:
        return 2 * (job.C + LANES) + 10 * lanes_of(job)
    return 2 * SHORT_TILE + 5 * job.unit_groups + LANES if job.S < SHORT else 2 * parameters_of(job) + job.unit_groups + LANES


cdef Py_ssize_t scratch_bytes(const Job *job) noexcept nogil:
    return (BLOCK + 2 * TILE + 2 * SHORT_TILE + doubles_of(job)) * sizeof(double) + BLOCK + 64 & ~<Py_ssize_t> 63


cdef Scratch scratch_of(const Job *job, char *memory) noexcept nogil:
    cdef Scratch s
    cdef double *tile = <double *> memory
    s.x = tile
    s.dy = tile + BLOCK
    s.y = tile + BLOCK + TILE
    s.weight = tile + BLOCK + 2 * TILE
    s.bias = tile + BLOCK + 2 * TILE + SHORT_TILE
    s.channels = tile + BLOCK + 2 * TILE + 2 * SHORT_TILE
    s.mask = <unsigned char *> (s.channels + doubles_of(job))
    return s


# ---- the table: each pass for the types of values, and for the two walks ----------------------------

cdef enum:
    MOMENTS, AFFINE, SUMS, GRADIENT


cdef inline void staged(int stage, const Task *task, const stored *_, vec like) noexcept nogil:
    cdef int kind = DX if stage == GRADIENT else task.job.activation
    cdef bint channels_last = task.job.channels_last, short = task.job.S < SHORT
    if stage == MOMENTS and channels_last:
        channels_last_moments(task, _, like)
    elif stage == MOMENTS:
        channels_first_moments(task, _, like)
    elif stage == SUMS and channels_last:
        channels_last_sums(task, _, like)
    elif stage == SUMS and short:
        short_sums(task, _, like)
    elif stage == SUMS:
        channels_first_sums(task, _, like)
    elif channels_last:
        channels_last_apply(task, kind, _, like)
    elif short:
        short_apply(task, kind, _, like)
    else:
        channels_first_apply(task, kind, _, like)


cdef inline void typed(int stage, const Task *task, Storage storage) noexcept nogil:
    if storage == FLOAT16:
        staged(stage, task, <const half *> NULL, gn_all_floats(0))
    elif storage == BFLOAT16:
        staged(stage, task, <const bfloat *> NULL, gn_all_floats(0))
    elif storage == FLOAT32:
        staged(stage, task, <const float *> NULL, gn_all_floats(0))
    else:
        staged(stage, task, <const double *> NULL, gn_all_doubles(0))


cdef void moments(const Task *task) noexcept nogil:
    typed(MOMENTS, task, task.job.x.storage)


cdef void affine(const Task *task) noexcept nogil:
    typed(AFFINE, task, task.job.work)


cdef void sums(const Task *task) noexcept nogil:
    typed(SUMS, task, task.job.work)


cdef void gradient(const Task *task) noexcept nogil:
    typed(GRADIENT, task, task.job.work)


cdef Kernel kernel
kernel.given = Pass(NULL, NULL, take_moments)
kernel.moments = Pass(moments, merge, give_moments)
kernel.affine = Pass(affine, NULL, NULL)
kernel.given_sums = Pass(NULL, NULL, take_sums)
kernel.sums = Pass(sums, add_sums, settle_sums)
kernel.gradient = Pass(gradient, NULL, NULL)
kernel.scratch_bytes = scratch_bytes
kernel.scratch_of = scratch_of
kernel.expand = expand
kernel.weights_carried = weights_carried
KERNEL = PyCapsule_New(&kernel, "gn_fast.kernel", NULL)

# The kernel: its parts, and the table of passes. A module for one instruction set is a title page that includes this file;
# arguments and threads live in the entry points.
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
        return 2 * (job.C + LANES) + 7 * lanes_of(job)
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


cdef inline void moments_as(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *found, const Scratch *scratch,
                            const stored *_, vec like) noexcept nogil:
    if job.channels_last:
        channels_last_moments(job, unit, chunk, found, scratch, _, like)
    else:
        channels_first_moments(job, unit, chunk, found, scratch, _, like)


cdef void moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, const Scratch *scratch) noexcept nogil:
    if job.x.storage == FLOAT16:
        moments_as(job, unit, chunk, found, scratch, <const half *> NULL, gn_all_floats(0))
    elif job.x.storage == BFLOAT16:
        moments_as(job, unit, chunk, found, scratch, <const bfloat *> NULL, gn_all_floats(0))
    elif job.x.storage == FLOAT32:
        moments_as(job, unit, chunk, found, scratch, <const float *> NULL, gn_all_floats(0))
    else:
        moments_as(job, unit, chunk, found, scratch, <const double *> NULL, gn_all_doubles(0))


cdef inline void affine_as(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, const Scratch *scratch,
                           const stored *_, vec like) noexcept nogil:
    if job.channels_last:
        channels_last_affine(job, unit, chunk, known, scratch, _, like)
    elif job.S < SHORT:
        short_affine(job, unit, chunk, known, scratch, _, like)
    else:
        channels_first_affine(job, unit, chunk, known, scratch, _, like)


cdef void affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, const Scratch *scratch) noexcept nogil:
    if job.work == FLOAT16:
        affine_as(job, unit, chunk, known, scratch, <const half *> NULL, gn_all_floats(0))
    elif job.work == BFLOAT16:
        affine_as(job, unit, chunk, known, scratch, <const bfloat *> NULL, gn_all_floats(0))
    elif job.work == FLOAT32:
        affine_as(job, unit, chunk, known, scratch, <const float *> NULL, gn_all_floats(0))
    else:
        affine_as(job, unit, chunk, known, scratch, <const double *> NULL, gn_all_doubles(0))


cdef inline void sums_as(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, const Scratch *scratch,
                         const stored *_, vec like) noexcept nogil:
    if job.channels_last:
        channels_last_sums(job, unit, chunk, known, found, scratch, _, like)
    elif job.S < SHORT:
        short_sums(job, unit, chunk, known, found, scratch, _, like)
    else:
        channels_first_sums(job, unit, chunk, known, found, scratch, _, like)


cdef void sums(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, const Scratch *scratch) noexcept nogil:
    if job.work == FLOAT16:
        sums_as(job, unit, chunk, known, found, scratch, <const half *> NULL, gn_all_floats(0))
    elif job.work == BFLOAT16:
        sums_as(job, unit, chunk, known, found, scratch, <const bfloat *> NULL, gn_all_floats(0))
    elif job.work == FLOAT32:
        sums_as(job, unit, chunk, known, found, scratch, <const float *> NULL, gn_all_floats(0))
    else:
        sums_as(job, unit, chunk, known, found, scratch, <const double *> NULL, gn_all_doubles(0))


cdef inline void gradient_as(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, const Scratch *scratch,
                             const stored *_, vec like) noexcept nogil:
    if job.channels_last:
        channels_last_dx(job, unit, chunk, known, scratch, _, like)
    elif job.S < SHORT:
        short_dx(job, unit, chunk, known, scratch, _, like)
    else:
        channels_first_dx(job, unit, chunk, known, scratch, _, like)


cdef void gradient(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, const Scratch *scratch) noexcept nogil:
    if job.work == FLOAT16:
        gradient_as(job, unit, chunk, known, scratch, <const half *> NULL, gn_all_floats(0))
    elif job.work == BFLOAT16:
        gradient_as(job, unit, chunk, known, scratch, <const bfloat *> NULL, gn_all_floats(0))
    elif job.work == FLOAT32:
        gradient_as(job, unit, chunk, known, scratch, <const float *> NULL, gn_all_floats(0))
    else:
        gradient_as(job, unit, chunk, known, scratch, <const double *> NULL, gn_all_doubles(0))


cdef Kernel kernel
kernel.given = Pass(NULL, NULL, take_moments)
kernel.moments = Pass(moments, merge, give_moments)
kernel.affine = Pass(affine, NULL, NULL)
kernel.sums = Pass(sums, add_sums, settle_sums)
kernel.gradient = Pass(gradient, NULL, NULL)
kernel.scratch_bytes = scratch_bytes
kernel.scratch_of = scratch_of
kernel.expand = expand
kernel.weights_carried = weights_carried
KERNEL = PyCapsule_New(&kernel, "gn_fast.kernel", NULL)

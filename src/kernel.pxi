# The kernel: what its parts share, and the table of passes. A module for one instruction set is a title page that
# includes this file; threads and checks live in the door.
#
#   tile    some thousand values, where they lie or gathered in L1
#   block   a tile whose moments are summed in lanes, x - p and (x - p)^2 about a pivot p near the mean
#   chunk   the blocks between two places where threads may part; its blocks are merged in order
#   unit    the groups of a sample that are swept together; its chunks are merged in order
#
# All are cut by position alone, so neither threads nor strides nor instruction sets can change a bit.

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport NAN, sqrt
from libc.string cimport memset

ctypedef fused real:  # the compute types
    float
    double

include "tile.pxi"
include "activation.pxi"

cdef extern from "port.h" nogil:
    double gn_power_of_two(double)
    void gn_prefetch(const char *, Py_ssize_t)
    ctypedef long double floats "gn_floats"  # for Cython a type apart from the others
    enum:
        FLOATS "GN_FLOATS"
    floats gn_floats_of_halfs(const half *)
    floats gn_floats_of_bfloats(const bfloat *)
    ctypedef double lanes "gn_lanes"
    enum:
        LANES "GN_LANES"
    lanes gn_lanes_of_floats(const float *)
    lanes gn_lanes_of_doubles(const double *)
    void gn_store_lanes(double *, lanes)
    void gn_floats_of_lanes(float *, lanes)
    double gn_total_of_eight(const double *)

cdef enum:
    VECTOR = 16  # values that are worked on at once: one to eight vectors
    STEP = 8 * VECTOR  # values that are added up at once
    PIECE = 2 * STEP  # values whose sums stay in the compute type before they are added up in float64
    BLOCK = 8 * PIECE  # values of a planar block, which has one pivot: few, for data that drift, and enough to hide the merge
    TILE = 1024  # values of a planar tile that is normalized, which stays in level 1 until it is stored, if it must be gathered
    ROWS = 32  # of an interleaved block
    WIDTH = 512  # lanes of an interleaved tile at most: its channels, or several positions of few channels
    AREA = 8192  # values of an interleaved tile that is summed, at most: 32 KiB of float32
    PATCH = 2048  # and of one that is normalized, which stays in level 1 until it is stored
    POSITIONS = 4096  # of an interleaved tile at most: ROWS of WIDTH // 4 lanes of one channel
    AHEAD = 4096  # values after those at work that channels-last walks fetch: 16 KiB of float32
    PIVOT_ROWS = 8  # of values averaged for a pivot: 0.4 standard deviations from the mean are as good as none
    SMALL = 512  # groups of fewer values have their moments computed in float64
    SHORT = 32  # values that stay in registers between load and store; channels of fewer positions are worked on many at a
    # time. GCC unrolls loops of 16 steps and vectorises none
    QUARTER = SHORT // 4


cdef inline floats floats_at(const stored *p) noexcept nogil:
    """Values of 16 bits."""
    if stored is half:
        return gn_floats_of_halfs(p)
    else:
        return gn_floats_of_bfloats(<const bfloat *> p)


cdef inline lanes lanes_at(const real *p) noexcept nogil:
    if real is float:
        return gn_lanes_of_floats(p)
    else:
        return gn_lanes_of_doubles(p)


cdef inline void put_lanes(real *p, lanes v) noexcept nogil:
    if real is float:
        gn_floats_of_lanes(p, v)
    else:
        gn_store_lanes(p, v)


include "moments.pxi"
include "affine.pxi"
include "interleaved.pxi"
include "gradient.pxi"
include "single.pxi"


# ---- the table: a function for each pass and compute type -------------------------------------------


cdef void give_moments(const Job *job, Py_ssize_t unit, double *known) noexcept nogil:
    """Round the mean to one float64, so that a later call with these moments gives the same bits."""
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t g, i = u.n * job.G + u.first
    for g in range(u.groups):
        known[PIVOT * u.groups + g] += known[SHIFT * u.groups + g]
        if known[M2 * u.groups + g] != known[M2 * u.groups + g]:
            known[PIVOT * u.groups + g] = known[M2 * u.groups + g]  # an infinity poisons the mean too
        known[SHIFT * u.groups + g] = 0
        if job.mean != NULL:
            job.count[i + g] = <int64_t> known[COUNT * u.groups + g]
            job.mean[i + g] = known[PIVOT * u.groups + g]
            job.m2[i + g] = known[M2 * u.groups + g]


cdef void take_moments(const Job *job, Py_ssize_t unit, double *known) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t g, i = u.n * job.G + u.first
    for g in range(u.groups):
        known[COUNT * u.groups + g] = job.count[i + g]
        known[PIVOT * u.groups + g] = job.mean[i + g]
        known[SHIFT * u.groups + g] = 0
        known[M2 * u.groups + g] = job.m2[i + g] if job.count[i + g] > 0 else 0


cdef void merge_moments(const Job *job, Py_ssize_t unit, double *into, const double *other) noexcept nogil:
    merge(into, other, unit_of(job, unit).groups)


cdef void find_moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *found, real _, stored *storage) noexcept nogil:
    if job.K * job.S < SMALL:
        small_moments(job, unit, found)
    elif job.interleaved:
        interleaved_moments[real](job, unit, chunk, found, 0)
    else:
        planar_moments[real, stored](job, unit, chunk, found, 0, storage)


cdef void moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found) noexcept nogil:
    if job.x.storage == FLOAT16:
        find_moments[float, half](job, unit, chunk, found, 0, NULL)
    elif job.x.storage == BFLOAT16:
        find_moments[float, bfloat](job, unit, chunk, found, 0, NULL)
    elif job.x.storage == FLOAT32:
        find_moments[float, float](job, unit, chunk, found, 0, NULL)
    else:
        find_moments[double, double](job, unit, chunk, found, 0, NULL)


cdef void apply_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, real _, stored *storage) noexcept nogil:
    if job.interleaved:
        interleaved_affine[real, stored](job, unit, chunk, known, 0, storage)
    elif job.S == 1:
        single_affine[real](job, unit, chunk, known, 0)
    else:
        planar_affine[real, stored](job, unit, chunk, known, 0, storage)


cdef void affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found) noexcept nogil:
    if job.x.storage == FLOAT16:
        apply_affine[float, half](job, unit, chunk, known, 0, NULL)
    elif job.x.storage == BFLOAT16:
        apply_affine[float, bfloat](job, unit, chunk, known, 0, NULL)
    elif job.x.storage == FLOAT32:
        apply_affine[float, float](job, unit, chunk, known, 0, NULL)
    else:
        apply_affine[double, double](job, unit, chunk, known, 0, NULL)


cdef void differentiate(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, bint summing, real _) noexcept nogil:
    if job.interleaved:
        interleaved_gradient[real](job, unit, chunk, known, found, summing, 0)
    elif job.S == 1:
        single_gradient[real](job, unit, chunk, known, found, summing, 0)
    else:
        planar_gradient[real](job, unit, chunk, known, found, summing, 0)


cdef void sums(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found) noexcept nogil:
    if job.x.storage == FLOAT64:
        differentiate[double](job, unit, chunk, known, found, True, 0)
    else:
        differentiate[float](job, unit, chunk, known, found, True, 0)


cdef void settle(const Job *job, Py_ssize_t unit, double *known) noexcept nogil:
    if job.x.storage == FLOAT64:
        settle_sums[double](job, unit, known, 0)
    else:
        settle_sums[float](job, unit, known, 0)


cdef void gradient(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found) noexcept nogil:
    if job.x.storage == FLOAT64:
        differentiate[double](job, unit, chunk, known, NULL, False, 0)
    else:
        differentiate[float](job, unit, chunk, known, NULL, False, 0)


cdef Kernel kernel
kernel.given = Pass(NULL, NULL, take_moments)
kernel.moments = Pass(moments, merge_moments, give_moments)
kernel.affine = Pass(affine, NULL, NULL)
kernel.sums = Pass(sums, add_sums, settle)
kernel.gradient = Pass(gradient, NULL, NULL)
KERNEL = PyCapsule_New(&kernel, "gn_fast.kernel", NULL)

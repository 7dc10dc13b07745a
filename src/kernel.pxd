# What the door (_core.pyx) and the kernels (_kernel_*.pyx) tell each other: an array as a kernel sees it, a
# job, and the table of functions that a kernel module hands over.  Declarations only.

from libc.stdint cimport int64_t

cdef enum Storage:  # how values lie in memory; kernels compute in float or double
    BOOL, FLOAT16, BFLOAT16, FLOAT32, FLOAT64

cdef enum Activation:
    IDENTITY, RELU, SILU, GELU, GELU_TANH, MISH

cdef enum:
    MAX_SPATIAL = 62  # NumPy's 64 dimensions less those of samples and channels

cdef struct View:  # an array as (N, C, *spatial); strides in bytes, 0 where it is broadcast
    char *data  # NULL: the array is absent
    Storage storage
    Py_ssize_t itemsize, sample_stride, channel_stride
    int ndim  # of the spatial dimensions, merged where their strides allow it; at least 1
    Py_ssize_t shape[MAX_SPATIAL]
    Py_ssize_t stride[MAX_SPATIAL]
    bint streamed  # written past the caches

cdef enum:  # Welford's state of n sets is double[4 * n], field by field; the mean is PIVOT + SHIFT
    COUNT, PIVOT, SHIFT, M2

cdef struct Job:  # everything a kernel needs to know of one call
    Py_ssize_t N, C, G, K, S  # samples, channels, groups, channels of a group, positions of a channel
    bint interleaved  # the walk: channels-last (position by position) or planar (channel by channel)
    Py_ssize_t unit_groups, units  # a unit of work is some groups of a sample: one if planar, else all
    Py_ssize_t chunks  # of a unit
    Py_ssize_t chunk  # interleaved: positions. Planar: values, of whole channels or of one of its pieces
    Py_ssize_t pieces
    Py_ssize_t ahead  # bytes behind those that a planar pass normalizes, where those for the next unit are asked for, or 0
    Py_ssize_t block  # samples whose dweight and dbias one thread adds up in order
    View x, y, residual, mask, weight, bias, dy, dresidual  # for the gradient y is dx
    int activation
    double eps
    int64_t *count  # the (N, G) statistics: given, wanted, or NULL
    double *mean
    double *m2
    double *dweight  # (blocks, C)
    double *dbias

cdef struct Unit:
    Py_ssize_t n, first, groups, c, channels  # its sample, and its groups and channels from the first on


cdef inline Unit unit_of(const Job *job, Py_ssize_t unit) noexcept nogil:
    cdef Py_ssize_t per_sample = job.units // job.N
    cdef Unit u
    u.n = unit // per_sample
    u.first = unit % per_sample * job.unit_groups
    u.groups = job.unit_groups
    u.c = u.first * job.K
    u.channels = u.groups * job.K
    return u


cdef inline void bounds(const Job *job, Py_ssize_t chunk, Py_ssize_t *start, Py_ssize_t *stop) noexcept nogil:
    """Of a planar chunk, in values of the unit."""
    if job.pieces == 1:
        start[0] = chunk * job.chunk
        stop[0] = min(start[0] + job.chunk, job.K * job.S)
    else:
        start[0] = chunk // job.pieces * job.S + chunk % job.pieces * job.chunk
        stop[0] = min(start[0] + job.chunk, (chunk // job.pieces + 1) * job.S)


# What is found of a unit lies in one array of doubles: the moments of its groups, the sums of dy' and of
# dy' * (x - mean) of its channels, unless these occur once and are settled at once, and two slopes of its groups (before
# they are settled the sums that a and b are made of).

cdef inline Py_ssize_t sums_at(const Job *job) noexcept nogil:
    return 4 * job.unit_groups


cdef inline Py_ssize_t slopes_at(const Job *job) noexcept nogil:
    return sums_at(job) + (2 * job.unit_groups * job.K if job.S > 1 else 0)


cdef struct Pass:  # one sweep over the chunks of a unit
    # What it writes, to `found` or to the output, depends on `known` (what earlier passes found) and the chunk only. It is
    # carried out once: a chunk of channels that occur once adds to dweight and dbias, where it is alone.
    void (*stage)(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found) noexcept nogil
    # Merge what another chunk found, in order; NULL if nothing is.
    void (*merge)(const Job *job, Py_ssize_t unit, double *into, const double *other) noexcept nogil
    # What is done once all are merged, or NULL.
    void (*settle)(const Job *job, Py_ssize_t unit, double *known) noexcept nogil

cdef struct Kernel:
    Pass given  # the statistics are read from the job
    Pass moments  # or found
    Pass affine  # y <- act((x - mean) * rstd * weight + bias + residual)
    Pass sums  # the sums of the gradient, dweight and dbias
    Pass gradient  # dx

# What the entry points (_core.pyx) and the kernels (kernel/) tell each other: an array as a kernel sees it, a job, and
# the table of functions that a kernel hands over. Declarations only.

from libc.stdint cimport int64_t

cdef enum Storage:  # how values lie in memory; kernels compute in float or double
    BOOL, FLOAT16, BFLOAT16, FLOAT32, FLOAT64

cdef enum Activation:
    IDENTITY, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH, MISH, HARDSWISH, SIGMOID, TANH

cdef enum:
    MAX_SPATIAL = 62  # NumPy's 64 dimensions less those of samples and channels
    SHORT = 16  # channels of fewer positions have a parameter for each value (short.pxi)
    # Values of a tile at most: whole pieces, and up to twice STEP rows of STRIP lanes; 8 channels of 14 x 14 in 16 bits end
    # with a line. One of x holds BLOCK.
    TILE = 1792
    SHORT_TILE = 512  # values that are worked on with their parameters; where these are absent, so many are all alike

cdef struct View:  # an array as (N, C, *spatial); strides in bytes, 0 where it is broadcast
    char *data  # NULL: the array is absent
    Storage storage
    Py_ssize_t itemsize, sample_stride, channel_stride
    int ndim  # of the spatial dimensions, merged where their strides allow it; at least 1
    Py_ssize_t shape[MAX_SPATIAL]
    Py_ssize_t stride[MAX_SPATIAL]
    bint streamed  # written past the caches

cdef enum:  # the moments of n groups are double[4 * n], field by field; the mean is PIVOT + SHIFT
    COUNT, PIVOT, SHIFT, M2

cdef struct Job:  # everything a kernel needs to know of one call
    Py_ssize_t N, C, G, K, S  # samples, channels, groups, channels of a group, positions of a channel
    bint channels_last  # the walk: row by row of channels, or channel by channel
    Py_ssize_t unit_groups, units  # a unit of work is some groups of a sample: all of them in channels-last
    Py_ssize_t chunks  # of a unit
    Py_ssize_t chunk  # channels-last: positions. Channels-first: values, of whole channels or of one of its pieces
    Py_ssize_t pieces
    Py_ssize_t ahead  # bytes behind those at work where others are asked for, or 0
    Py_ssize_t block  # samples whose dweight and dbias one thread adds up in order
    Storage work  # x's if all arrays have it, else the compute type: what a tile holds
    View x, y, residual, mask, weight, bias, dy, dresidual  # for the gradient y is dx; weight and bias in a row
    void *weights  # of short channels: a weight for each value of a sample, in the compute type, and a bias
    void *biases
    Py_ssize_t weight_step, bias_step  # bytes from one sample's to the next
    Py_ssize_t weight_size, bias_size  # of each in bytes, or 0 where all are alike
    int activation
    double leak  # of LEAKY_RELU: its slope below 0
    double eps
    int64_t *count  # the (N, G) statistics: given, wanted, or NULL
    double *mean
    double *m2
    double *dweight  # sums of dy' * xhat and of dy': found, (blocks, C), or given, (N, C)
    double *dbias

cdef struct Unit:
    Py_ssize_t n, first, groups, c, channels  # its sample, and its groups and channels from the first on


cdef inline Unit unit_of(const Job *job, Py_ssize_t unit) noexcept nogil:
    cdef Py_ssize_t per_sample = job.G // job.unit_groups
    cdef Unit u
    u.n = unit // per_sample
    u.first = unit % per_sample * job.unit_groups
    u.groups = job.unit_groups
    u.c = u.first * job.K
    u.channels = u.groups * job.K
    return u


cdef inline void bounds(const Job *job, Py_ssize_t chunk, Py_ssize_t *start, Py_ssize_t *stop) noexcept nogil:
    """Of a chunk in channels-first, in values of the unit."""
    if job.chunks == 1:
        start[0] = 0
        stop[0] = job.unit_groups * job.K * job.S
    elif job.pieces == 1:
        start[0] = chunk * job.chunk
        stop[0] = min(start[0] + job.chunk, job.K * job.S)
    else:
        start[0] = chunk // job.pieces * job.S + chunk % job.pieces * job.chunk
        stop[0] = min(start[0] + job.chunk, (chunk // job.pieces + 1) * job.S)


# What is found of a unit lies in one array of doubles: the moments of its groups; the sums of dy' and of dy' * (x -
# mean) of its channels; and the two means a and b of its groups that dx is made of (before they are settled, their
# sums).

cdef inline Py_ssize_t sums_at(const Job *job) noexcept nogil:
    return 4 * job.unit_groups


cdef inline Py_ssize_t slopes_at(const Job *job) noexcept nogil:
    return sums_at(job) + 2 * job.unit_groups * job.K


cdef struct Scratch:  # a thread's own memory
    void *x  # tiles of TILE values each
    void *dy
    void *y  # the residual too, and what is activated
    void *weight  # of short channels
    void *bias
    unsigned char *mask
    double *channels  # some doubles for each channel of a unit, or each lane of a row

cdef struct Task:  # a chunk of a unit
    const Job *job
    Py_ssize_t unit, chunk
    const double *known  # what earlier passes found of the unit
    double *found  # where this one puts what it finds
    const Scratch *scratch
    void *kept  # dy' of the unit, from the pass of its sums to that of dx, or NULL

cdef struct Pass:  # one sweep over the chunks of a unit
    # What it writes, to `found` or to the output, depends on `known` and the chunk only.
    void (*stage)(const Task *task) noexcept nogil
    # Merge what another chunk found, in order; NULL if nothing is.
    void (*merge)(const Job *job, double *into, const double *other) noexcept nogil
    # What is done once all are merged, or NULL.
    void (*settle)(const Job *job, Py_ssize_t unit, double *known, const Scratch *scratch) noexcept nogil

cdef struct Kernel:
    Pass given  # the statistics are read from the job
    Pass moments  # or found
    Pass affine  # y <- act((x - mean) * rstd * weight + bias + residual)
    Pass given_sums  # the sums of the gradient, dweight and dbias, are read from the job
    Pass sums  # or found
    Pass gradient  # dx
    Py_ssize_t (*scratch_bytes)(const Job *job) noexcept nogil
    Scratch (*scratch_of)(const Job *job, char *memory) noexcept nogil
    void (*expand)(Job *job, void *weights, void *biases) noexcept nogil  # the parameters of short channels
    bint (*weights_carried)(const Job *job) noexcept nogil

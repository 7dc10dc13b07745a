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
    bint buffered  # never worked on where it lies: it is streamed, or an output that is also the input
    bint streamed  # written past the caches

cdef enum:  # Welford's state of n sets is double[4 * n], field by field; the mean is PIVOT + SHIFT
    COUNT, PIVOT, SHIFT, M2

cdef struct Job:  # everything a kernel needs to know of one call
    Py_ssize_t N, C, G, K, S  # samples, channels, groups, channels of a group, positions of a channel
    bint interleaved  # the walk: channels-last (position by position) or planar (channel by channel)
    Py_ssize_t unit_groups, units  # a unit of work is some groups of a sample: one if planar, else all or a strip
    Py_ssize_t chunk, chunks  # a unit is cut into chunks of so many values (planar) or positions (interleaved)
    View x, y, residual, mask, weight, bias
    int activation
    double eps
    int64_t *count  # the (N, G) statistics: given, wanted, or NULL
    double *mean
    double *m2

# Work on one chunk of one unit, whose groups have the moments `stats`.
ctypedef void (*Stage)(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats) noexcept nogil

cdef struct Kernel:  # each stage for float32 arithmetic and for float64
    Stage moments[2]  # stats <- the moments of the chunk
    Stage affine[2]  # y <- act((x - mean) * rstd * weight + bias + residual) on the chunk
    void (*merge)(double *into, const double *other, Py_ssize_t n) noexcept nogil

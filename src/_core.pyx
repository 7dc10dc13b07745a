# cython: boundscheck=True, wraparound=True
"""The entry points: check the arguments, see every array as (N, C, *spatial), and send the work to a kernel.

No arithmetic lives here (that is kernel/) and no thread (threads.pxi).
"""

import os

import numpy as np

from gn_fast.moments import Moments

cimport numpy as cnp
from cpython.ref cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport NAN
from libc.stdint cimport int64_t

from job cimport *

include "threads.pxi"
include "pool.pxi"

cdef extern from "threads.h" nogil:
    int gn_x86_64_level()

cnp.import_array()

cdef enum:
    CHUNK = 1 << 16  # values, so that 256 KiB of float32 are swept again from a core's level 2 cache
    MAX_CHUNKS = 256  # of a unit: bounds what a unit's chunks found
    UNIT = 1 << 12  # values of several groups that make a unit, so that little time goes from one to the next

_ACTIVATIONS = {None: IDENTITY, "relu": RELU, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "mish": MISH}
_DTYPES = "float16, bfloat16, float32, float64, an integer type or bool"


# ---- instruction sets ------------------------------------------------------------------------------

cdef Kernel *kernel = NULL
_isa = None


def isa_levels():
    """The instruction sets that this machine and this build both have, weakest first.

    Returns
    -------
    tuple of str
        On x86-64 some of ``x86_64_v2``, ``x86_64_v3`` and ``x86_64_v4`` (the levels of the x86-64 psABI),
        elsewhere ``baseline``. All with fused multiply-add (v3, v4, ARM64) give the same bits.

    Examples
    --------
    >>> import gn_fast
    >>> len(gn_fast.isa_levels()) >= 1
    True
    """
    level = gn_x86_64_level()
    return tuple(f"x86_64_v{v}" for v in range(2, level + 1)) if level else ("baseline",)


def _set_isa(level):
    global kernel, _isa
    module = __import__(f"gn_fast._kernel_{level}", fromlist=["KERNEL"])
    kernel = <Kernel *> PyCapsule_GetPointer(module.KERNEL, "gn_fast.kernel")
    _isa = level


def _isa_of_environment():
    levels = isa_levels()
    if not levels:
        raise ImportError("gn_fast needs an x86-64-v2 processor (SSE4.2) or better")
    level = os.environ.get("GN_FAST_ISA") or levels[-1]
    if level not in levels:
        raise ImportError(f"GN_FAST_ISA must be one of {', '.join(levels)}, which this machine supports, not {level!r}")
    return level


_set_isa(_isa_of_environment())


@contextlib.contextmanager
def use_isa(level):
    """Compute with another instruction set inside a ``with`` block, in the whole process: for tests and benchmarks.

    Parameters
    ----------
    level : str
        One of :func:`isa_levels`.

    Raises
    ------
    ValueError
        If `level` is not one of them.

    Examples
    --------
    >>> import gn_fast
    >>> with gn_fast.use_isa(gn_fast.isa_levels()[0]):
    ...     gn_fast.show_config("dicts")["isa"]["used"] == gn_fast.isa_levels()[0]
    True
    """
    if level not in isa_levels():
        raise ValueError(f"level must be one of {', '.join(isa_levels())}, not {level!r}")
    before = _isa
    _set_isa(level)
    try:
        yield
    finally:
        _set_isa(before)


def _config():
    return {
        "isa": {"used": _isa, "available": list(isa_levels())},
        "threads": {"used": get_num_threads(), "openmp": GN_OPENMP or None, "processors": _processors()},
        "caches": {"level 2": L2_BYTES, "last level": LAST_LEVEL_BYTES},
        "pool": {"limit": gn_pool_limit, "kept": gn_pool_kept()},
    }


# ---- arguments -------------------------------------------------------------------------------------

cdef int storage_of(cnp.ndarray a) except -2:
    """Its Storage, or -1 for a dtype that is none."""
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return FLOAT32
    if number == cnp.NPY_DOUBLE:
        return FLOAT64
    if number == cnp.NPY_FLOAT16:
        return FLOAT16
    if number == cnp.NPY_BOOL:
        return BOOL
    scalar = (<object> a).dtype.type
    if scalar.__name__ == "bfloat16" and scalar.__module__ == "ml_dtypes":  # known without importing it
        return BFLOAT16
    return -1


cdef cnp.ndarray as_array(value, str name):
    """Any array-like as an aligned ndarray in native byte order, of a floating storage type."""
    cdef cnp.ndarray a
    cdef int storage
    if not cnp.PyArray_CheckExact(value):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} must not be a masked array: pass its data, and mask=~{name}.mask for the statistics")
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"{name} must be an array or what NumPy can make one of: {error}") from None
    a = value
    storage = storage_of(a)
    if storage <= BOOL:
        if (<object> a).dtype.kind not in "iub":
            raise TypeError(f"{name} must be of dtype {_DTYPES}, not {(<object> a).dtype}")
        return (<object> a).astype(np.float64)
    if not cnp.PyArray_ISBEHAVED_RO(a):
        return (<object> a).astype((<object> a).dtype.newbyteorder("="))
    return a


cdef int view(View *v, cnp.ndarray a, int axis) except -1:
    """See an array as (N, C, *spatial), the spatial dimensions merged where their strides allow it."""
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(a)
    cdef cnp.npy_intp *stride = cnp.PyArray_STRIDES(a)
    cdef int d, k = 0
    v.data = cnp.PyArray_BYTES(a)
    v.storage = <Storage> storage_of(a)
    v.itemsize = cnp.PyArray_ITEMSIZE(a)
    v.sample_stride = stride[0]
    v.channel_stride = stride[axis]
    v.streamed = False
    v.shape[0] = 1
    v.stride[0] = v.channel_stride
    for d in range(1, cnp.PyArray_NDIM(a)):
        if d == axis or shape[d] == 1:
            continue
        if k and v.stride[k - 1] == shape[d] * stride[d]:
            v.shape[k - 1] *= shape[d]
            v.stride[k - 1] = stride[d]
        else:
            v.shape[k] = shape[d]
            v.stride[k] = stride[d]
            k += 1
    v.ndim = max(k, 1)
    return 0


cdef tuple per_channel(View *v, value, str name, Job *job, out):
    """See a weight or bias of shape (C,) or (N, C) as an (N, C) array whose channels lie in a row, float32 or float64. Returns it as
    it was given and as it is seen, which the caller keeps alive."""
    cdef cnp.ndarray a = as_array(value, name), given = a
    cdef int ndim = cnp.PyArray_NDIM(a)
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(a)
    if not (ndim == 1 and shape[0] == job.C or ndim == 2 and shape[0] == job.N and shape[1] == job.C):
        raise ValueError(f"{name} must have shape ({job.C},) or ({job.N}, {job.C}), not {shape_of(a)}")
    if storage_of(a) < FLOAT32:
        a = (<object> a).astype(np.float32, order="C")
    elif not cnp.PyArray_IS_C_CONTIGUOUS(a):
        a = (<object> a).copy()
    else:
        a = apart(a, out)
    v.data = cnp.PyArray_BYTES(a)
    v.storage = <Storage> storage_of(a)
    v.itemsize = v.channel_stride = cnp.PyArray_ITEMSIZE(a)
    v.sample_stride = v.itemsize * job.C if ndim == 2 else 0
    return given, a


cdef shape_of(cnp.ndarray a):
    return (<object> a).shape


cdef int checked_activation(value) except -1:
    try:
        return _ACTIVATIONS[value]
    except (KeyError, TypeError):
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"activation must be one of {known}, not {value!r}") from None


cdef Py_ssize_t integer(value, str name) except? -1:
    if type(value) is not int and (isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    try:
        return value if type(value) is int else value.__index__()
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is out of range: {value!r}") from None


cdef double checked_eps(value) except? -1:
    cdef double eps
    try:
        eps = value
    except TypeError:
        raise TypeError(f"eps must be a number, not {value!r}") from None
    except OverflowError:
        raise ValueError("eps must be a finite number of at least 0, not an integer beyond float64") from None
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, not {value!r}")
    return eps


cdef cnp.ndarray checked_mask(mask, cnp.ndarray x, int axis):
    """The mask broadcast to x's shape."""
    if isinstance(mask, np.ma.MaskedArray):
        raise TypeError("mask must not be a masked array but a plain array of dtype bool")
    try:
        mask = np.asarray(mask)
    except ValueError as error:
        raise TypeError(f"mask must be an array of dtype bool: {error}") from None
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be of dtype bool, not {mask.dtype}")
    wanted = list(shape_of(x))
    wanted[axis] = 1
    try:
        whole = np.broadcast_to(mask, wanted)
    except ValueError:
        raise ValueError(f"mask must be broadcastable to x with one channel, {tuple(wanted)}, not {mask.shape}") from None
    return np.broadcast_to(whole, shape_of(x))


cdef bint one_place_each(cnp.ndarray a):
    """Whether no two elements share memory."""
    if cnp.PyArray_IS_C_CONTIGUOUS(a):
        return True
    steps = sorted((abs(stride), size) for stride, size in zip((<object> a).strides, shape_of(a)) if size > 1)
    reach = a.itemsize
    for stride, size in steps:
        if stride < reach:  # the dimensions are interwoven, or overlap: count the places
            places = np.zeros((), np.intp)
            for stride, size in steps:
                places = np.add.outer(places, stride * np.arange(size))
            places = np.sort(places, axis=None)
            return bool((np.diff(places) >= a.itemsize).all())
        reach += stride * (size - 1)
    return True


cdef int check_out(value, cnp.ndarray x) except -1:
    if not cnp.PyArray_Check(value) or (not cnp.PyArray_CheckExact(value) and isinstance(value, np.ma.MaskedArray)):
        raise TypeError(f"out must be a numpy.ndarray, not {type(value).__name__}")
    cdef cnp.ndarray out = value
    if not cnp.PyArray_EquivTypenums(cnp.PyArray_TYPE(out), cnp.PyArray_TYPE(x)):
        raise TypeError(f"out must be of dtype {(<object> x).dtype}, not {(<object> out).dtype}")
    if not cnp.PyArray_SAMESHAPE(out, x):
        raise ValueError(f"out must have shape {shape_of(x)}, not {shape_of(out)}")
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out must be writeable, not read-only")
    if not one_place_each(out):
        raise ValueError(f"out must not overlap itself, as shape {shape_of(out)} does with strides {value.strides}")
    return 0


cdef bint same_places(cnp.ndarray a, cnp.ndarray b):
    """Whether each element of a lies exactly where b's does: then b is overwritten only after a was read."""
    cdef int d
    if cnp.PyArray_BYTES(a) != cnp.PyArray_BYTES(b) or cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(b):
        return False
    for d in range(cnp.PyArray_NDIM(b)):
        if cnp.PyArray_STRIDES(a)[d] != cnp.PyArray_STRIDES(b)[d] and cnp.PyArray_DIMS(b)[d] > 1:
            return False
    return True


cdef char *extent(cnp.ndarray a, char **end):
    """The first byte of an array, and the byte after its last."""
    cdef char *start = cnp.PyArray_BYTES(a)
    cdef Py_ssize_t reach
    cdef int d
    end[0] = start
    if cnp.PyArray_SIZE(a) == 0:
        return start
    for d in range(cnp.PyArray_NDIM(a)):
        reach = (cnp.PyArray_DIMS(a)[d] - 1) * cnp.PyArray_STRIDES(a)[d]
        if reach < 0:
            start += reach
        else:
            end[0] += reach
    end[0] += cnp.PyArray_ITEMSIZE(a)
    return start


cdef bint shared(cnp.ndarray a, cnp.ndarray b):
    """Whether they share memory; a case too hard to decide counts as if."""
    cdef char *a_end
    cdef char *b_end
    cdef char *a_start = extent(a, &a_end)
    cdef char *b_start = extent(b, &b_end)
    if a_end <= b_start or b_end <= a_start:
        return False
    try:
        return np.shares_memory(a, b, max_work=1000)
    except np.exceptions.TooHardError:
        return True


cdef cnp.ndarray apart(cnp.ndarray a, cnp.ndarray out):
    """An input that is safe to read while `out` is written: itself, or a copy if they overlap in part."""
    if out is None or not shared(a, out):
        return a
    return (<object> a).copy(order="K")


cdef int plan_walk(Job *job, bint channels_last) except -1:
    """Choose the walk, the units of work and the chunks: by shape and order of memory only, since bits depend on them."""
    cdef View *v = &job.x
    cdef Py_ssize_t channels, across = abs(v.channel_stride), along = abs(v.stride[v.ndim - 1])
    job.channels_last = job.S > 1 and job.C > 1 and (across < along if across and along else channels_last)
    if job.channels_last:
        job.unit_groups = job.G
        job.units = job.N
        job.chunk = max(CHUNK // job.C, (job.S + MAX_CHUNKS - 1) // MAX_CHUNKS)
        job.chunk = (job.chunk + 511) // 512 * 512
        job.chunks = (job.S + job.chunk - 1) // job.chunk
    else:
        while job.G % (2 * job.unit_groups) == 0 and 2 * job.unit_groups * max(job.K * job.S, 1 << 4) <= UNIT:
            job.unit_groups *= 2
        job.units = job.N * job.G // job.unit_groups
        job.pieces = max(1, min((job.S + CHUNK - 1) // CHUNK, MAX_CHUNKS // max(job.K, 1)))
        if job.pieces == 1:
            channels = max(1, CHUNK // max(job.S, 1), (job.K + MAX_CHUNKS - 1) // MAX_CHUNKS)
            job.chunk = channels * job.S
            job.chunks = (job.K + channels - 1) // channels if job.unit_groups == 1 else 1
        else:
            job.chunk = ((job.S + job.pieces - 1) // job.pieces + 2047) // 2048 * 2048
            job.pieces = (job.S + job.chunk - 1) // job.chunk
            job.chunks = job.K * job.pieces
    return 0


cdef int view_x(Job *job, cnp.ndarray x, num_groups, axis_argument, int *axis_out) except -1:
    cdef Py_ssize_t ndim = cnp.PyArray_NDIM(x), axis, size = 1, d
    if ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions, samples and channels, not shape {shape_of(x)}")
    axis = integer(axis_argument, "axis")
    if not -ndim <= axis < ndim or axis % ndim == 0:
        raise ValueError(f"axis must be the channels' of {ndim} dimensions and not the first, not {axis}")
    axis = (axis + ndim) % ndim
    job.N = cnp.PyArray_DIMS(x)[0]
    job.C = cnp.PyArray_DIMS(x)[axis]
    job.G = integer(num_groups, "num_groups")
    if job.G < 1:
        raise ValueError(f"num_groups must be at least 1, not {job.G}")
    if job.C % job.G:
        raise ValueError(f"num_groups must divide the number of channels, {job.C}, not be {job.G}")
    job.K = job.C // job.G
    for d in range(1, ndim):
        if d != axis:
            size *= cnp.PyArray_DIMS(x)[d]
    job.S = size
    axis_out[0] = axis
    view(&job.x, x, axis)
    if job.N * job.C * job.S:
        plan_walk(job, axis == ndim - 1)
    return 0


# ---- the functions ---------------------------------------------------------------------------------


cdef struct Call:
    Job job
    Plan plan
    int axis


cdef int see_output(Job *job, View *v, cnp.ndarray a, int axis) except -1:
    """An output, streamed if it is larger than the last level cache."""
    view(v, a, axis)
    v.streamed = cnp.PyArray_NBYTES(a) > LAST_LEVEL_BYTES
    return 0


cdef Storage compute_type(const Job *job):
    return FLOAT64 if job.x.storage == FLOAT64 else FLOAT32


cdef bint in_type(const View *v, Storage storage):
    return v.data == NULL or v.storage == storage


cdef settle_types(Job *job):
    """Choose the type that a tile holds, and give short channels a weight and a bias for each value; the caller keeps what is returned
    alive."""
    cdef cnp.ndarray weights = None, biases = None
    cdef Py_ssize_t values = job.C * job.S
    cdef bint gradient = job.dy.data != NULL, short = job.S < SHORT and not job.channels_last
    job.work = job.x.storage
    if (not (in_type(&job.residual, job.work) and in_type(&job.dy, job.work) and in_type(&job.dresidual, job.work))
            or (gradient and (job.activation != IDENTITY or job.mask.data != NULL or job.residual.data != NULL))):
        job.work = compute_type(job)
    if short and not kernel.weights_carried(job):
        job.work = FLOAT64
    if short and values:
        number = cnp.NPY_DOUBLE if job.work == FLOAT64 else cnp.NPY_FLOAT
        if not each_has_its_own(job, &job.weight):
            weights = empty_row(expanded_size(job, &job.weight), number)
        if not each_has_its_own(job, &job.bias):
            biases = empty_row(expanded_size(job, &job.bias), number)
        kernel.expand(job, NULL if weights is None else cnp.PyArray_DATA(weights), NULL if biases is None else cnp.PyArray_DATA(biases))
    return weights, biases


cdef bint each_has_its_own(const Job *job, const View *v):
    """Whether a weight or bias has a value for each of a sample, in the type that is computed in."""
    return job.S == 1 and v.data != NULL and (v.storage == FLOAT64) == (job.work == FLOAT64)


cdef Py_ssize_t expanded_size(const Job *job, const View *v):
    if v.data == NULL:
        return min(job.C * job.S, SHORT_TILE)
    return job.C * job.S * (job.N if v.sample_stride else 1)


cdef cnp.ndarray empty_row(Py_ssize_t size, int number):
    cdef cnp.npy_intp n = size
    return cnp.PyArray_EMPTY(1, &n, number, 0)


cdef int add_pass(Call *call, const Pass *p) except -1:
    call.plan.passes[call.plan.count] = p[0]
    call.plan.count += 1
    return 0


cdef cnp.ndarray open_call(Call *call, x, num_groups, axis):
    """x as an array; the call gets its shape, strides and walk."""
    cdef cnp.ndarray a = as_array(x, "x")
    cdef Job *job = &call.job
    job.weight.data = job.bias.data = job.residual.data = job.mask.data = job.dy.data = job.dresidual.data = NULL
    job.weight.storage = job.bias.storage = FLOAT32
    job.count = NULL
    job.mean = job.m2 = NULL
    job.activation = IDENTITY
    job.channels_last = False
    job.unit_groups = job.units = job.chunks = job.pieces = job.block = 1
    view_x(job, a, num_groups, axis, &call.axis)
    call.plan.job = job
    call.plan.count = 0
    call.plan.size = 4 * job.unit_groups
    return a


cdef int use_moments(Job *job, moments) except -1:
    """Point the job at the arrays of these Moments, which the caller keeps alive."""
    job.count = <int64_t *> cnp.PyArray_DATA(moments.count)
    job.mean = <double *> cnp.PyArray_DATA(moments.mean)
    job.m2 = <double *> cnp.PyArray_DATA(moments.m2)
    return 0


cdef empty_moments(Job *job):
    shape = (job.N, job.G)
    return Moments._trusted(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))


cdef checked_moments(Job *job, moments, out):
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be gn_fast.Moments, not {type(moments).__name__}")
    if moments.count.shape != (job.N, job.G):
        raise ValueError(f"moments must have shape ({job.N}, {job.G}), samples and groups, not {moments.count.shape}")
    given = moments.count, moments.mean, moments.m2
    for a in given:
        if not cnp.PyArray_ISCARRAY_RO(a) or (out is not None and shared(a, out)):
            return Moments._trusted(*(apart(np.require(a, requirements="CA"), out) for a in given))
    return moments


cdef tuple read_options(Call *call, cnp.ndarray x, weight, bias, eps, residual, activation, mask, moments, out, num_threads):
    """Check what forward and backward have in common. Returns the weight and the bias as arrays, what else must stay
    alive during the call, the number of threads and the moments."""
    cdef Job *job = &call.job
    cdef cnp.ndarray w = None, b = None, r = None, m = None
    seen_weight = seen_bias = None
    job.eps = checked_eps(eps)
    if num_threads is not None:
        num_threads = _thread_count(num_threads, "num_threads")
    if activation is not None:
        job.activation = checked_activation(activation)
    if weight is not None:
        w, seen_weight = per_channel(&job.weight, weight, "weight", job, out)
    if bias is not None:
        b, seen_bias = per_channel(&job.bias, bias, "bias", job, out)
    if residual is not None:
        r = like_x(&job.residual, residual, "residual", x, call.axis, out)
    if mask is not None:
        m = apart(checked_mask(mask, x, call.axis), out)
        view(&job.mask, m, call.axis)
    if moments is not None:
        moments = checked_moments(job, moments, out)
        use_moments(job, moments)
        add_pass(call, &kernel.given)
    return w, b, (r, m, seen_weight, seen_bias), num_threads, moments


cdef cnp.ndarray like_x(View *v, value, str name, cnp.ndarray x, int axis, out):
    """See an argument of x's shape; where `out` overlaps it other than exactly, a copy of it."""
    cdef cnp.ndarray a = as_array(value, name)
    if not cnp.PyArray_SAMESHAPE(a, x):
        raise ValueError(f"{name} must have x's shape {shape_of(x)}, not {shape_of(a)}")
    if out is not None and not same_places(a, out):
        a = apart(a, out)
    view(v, a, axis)
    return a


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, *, axis=1, residual=None, activation=None,
               mask=None, moments=None, out=None, return_moments=False, num_threads=None):
    """Group normalization: each sample's groups of channels brought to mean 0 and variance 1, then weighted.

    For sample n and group g, over the D = C/G * prod(spatial) values of that slab::

        mean = sum(x) / D       var = sum((x - mean)^2) / D       rstd = 1 / sqrt(var + eps)
        y = activation((x - mean) * rstd * weight[c] + bias[c] + residual)

    Parameters
    ----------
    x : array_like, shape (N, C, spatial...), or with the channels at `axis`
        float16, bfloat16 (of ``ml_dtypes``), float32 or float64; integers and bools are taken as float64. Any
        strides: neither channels-last nor strided arrays are copied.
    num_groups : int
        G, the number of groups (not their size); it must divide C. 1 is layer normalization over all but the
        samples, C is instance normalization.
    weight, bias : array_like, shape (C,) or (N, C), optional
        Scale and shift, each of any float dtype: of a channel, or of a channel in each sample (AdaGN, FiLM).
    eps : float
        Added to the variance inside the root; at least 0.
    axis : int
        Which axis has the channels: any but the first. ``-1`` for channels-last.
    residual : array_like, x's shape, optional
        Added after the affine and before the activation.
    activation : {None, "relu", "silu", "gelu", "gelu_tanh", "mish"}
        "gelu" is the exact one, by erf. Within 4 ulp of exact in float32.
    mask : array_like of bool, optional
        Broadcastable to x with one channel. False positions (padding) do not count in the statistics; they are
        normalized like the others.
    moments : Moments, shape (N, G), optional
        Use these statistics instead of x's own.
    out : ndarray, x's shape and dtype, optional
        Where to write. It may be x itself; where it overlaps an input otherwise, that is copied first.
    return_moments : bool
        Also return the statistics that were used.
    num_threads : int, optional
        At most so many threads in this call; by default what :func:`get_num_threads` says.

    Returns
    -------
    y : ndarray
        `out`, or a new array of x's shape, dtype (float64 for integers) and order of memory.
    moments : Moments
        Only with ``return_moments=True``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it; `out` is then as it was.
    MemoryError
        If there is no memory for the result.

    See Also
    --------
    group_norm_backward : its gradient.
    group_moments : its statistics.

    Notes
    -----
    The moments are found in one pass: blocks of values are summed about a pivot near their mean in float32
    (float64 for float64) and merged in float64 by the update of Chan, Golub and LeVeque (1983) [2]_. The mean is
    subtracted before anything is multiplied. float32 results are within 2 ulp of exact for a mean of up to 1e6
    standard deviations, and the same to the last bit for any number of threads, batch and strides, and any instruction
    set with fused multiply-add.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", 2018, arXiv:1803.08494, equations 1, 2 and 7.
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample variance: analysis and
       recommendations", The American Statistician 37, 1983, equation 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> import gn_fast
    >>> x = np.random.default_rng(0).random((2, 8, 4, 4), dtype=np.float32)
    >>> y = gn_fast.group_norm(x, 2)
    >>> slabs = y.reshape(2, 2, -1)
    >>> bool(abs(slabs.mean(-1)).max() < 1e-6), bool(abs(slabs.std(-1) - 1).max() < 1e-3)
    (True, True)

    Channels-last, with a weight, and the SiLU fused in:

    >>> y = gn_fast.group_norm(x.transpose(0, 2, 3, 1), 2, np.full(8, 2.0), axis=-1, activation="silu")
    >>> y.shape
    (2, 4, 4, 8)
    """
    cdef Call call
    cdef Job *job = &call.job
    cdef cnp.ndarray a = open_call(&call, x, num_groups, axis), y = None
    if out is not None:
        check_out(out, a)
    w, b, alive, num_threads, statistics = read_options(  # arrays named here stay alive until the end
        &call, a, weight, bias, eps, residual, activation, mask, moments, out, num_threads)
    if statistics is None:
        add_pass(&call, &kernel.moments)
        if return_moments:
            statistics = empty_moments(job)
            use_moments(job, statistics)
    if out is not None:
        if cnp.PyArray_ISBEHAVED(out):
            y = out
        if not same_places(a, out):
            a = apart(a, out)
            view(&job.x, a, call.axis)
    if y is None:
        y = fresh_like(a)
    see_output(job, &job.y, y, call.axis)
    add_pass(&call, &kernel.affine)
    parameters = settle_types(job)
    run(&call.plan, num_threads)
    result = finished(x, y, out)
    return (result, moments or statistics) if return_moments else result


cdef finished(x, cnp.ndarray y, out):
    """The result as the caller asked for it: in `out`, or of x's own array type."""
    if out is not None:
        if out is not y:
            out[...] = y
        return out
    if cnp.PyArray_Check(x) and not cnp.PyArray_CheckExact(x):
        return x.__array_wrap__(y)
    return y


def group_moments(x, num_groups, *, axis=1, mask=None, num_threads=None):
    """The statistics of each sample's groups: count, mean and sum of squared deviations.

    Parameters
    ----------
    x, num_groups, axis, mask, num_threads
        As for :func:`group_norm`.

    Returns
    -------
    Moments
        Of shape (N, G). A group with nothing to count has count, mean and m2 0; NaN or infinity in x makes the mean
        and m2 of its group NaN or infinite. Those of parts can be merged into those of the whole.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it.

    Notes
    -----
    One pass over x, merging blocks by the update of Chan, Golub and LeVeque (1983), "Algorithms for computing the
    sample variance", The American Statistician 37, equation 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> import gn_fast
    >>> m = gn_fast.group_moments(np.arange(8.0).reshape(1, 2, 4), 2)
    >>> m.mean
    array([[1.5, 5.5]])
    >>> m.var
    array([[1.25, 1.25]])
    """
    cdef Call call
    cdef cnp.ndarray a = open_call(&call, x, num_groups, axis)
    w, b, alive, num_threads, _ = read_options(&call, a, None, None, 0.0, None, None, mask, None, None, num_threads)
    statistics = empty_moments(&call.job)
    use_moments(&call.job, statistics)
    add_pass(&call, &kernel.moments)
    call.job.work = call.job.x.storage
    run(&call.plan, num_threads)
    return statistics


cdef summed(cnp.ndarray sums, cnp.ndarray value, Job *job):
    """A weight's or bias's gradient from its sums over blocks of samples, which are added up in order."""
    cdef double *total = <double *> cnp.PyArray_DATA(sums)
    cdef cnp.ndarray result
    cdef Py_ssize_t n, c, size
    if value is None:
        return None
    result = PyArray_NewLikeArray(value, cnp.NPY_CORDER, NULL, 0)
    size = cnp.PyArray_SIZE(result)
    if cnp.PyArray_NDIM(value) == 1:
        for n in range(1, cnp.PyArray_DIM(sums, 0)):
            for c in range(job.C):
                total[c] += total[n * job.C + c]
    for c in range(size):
        if total[c] != total[c]:
            total[c] = NAN  # one of them: the sign of a sum of NaNs is the compiler's choice
    if storage_of(result) == FLOAT32:
        for c in range(size):
            (<float *> cnp.PyArray_DATA(result))[c] = <float> total[c]
    else:
        with np.errstate(all="ignore"):  # beyond the largest float16 is infinity, as it is in dx
            (<object> result)[...] = sums[0] if cnp.PyArray_NDIM(value) == 1 else sums
    return result


def group_norm_backward(dy, x, num_groups, weight=None, bias=None, eps=1e-5, *, axis=1, residual=None,
                        activation=None, mask=None, moments=None, out=None, num_threads=None):
    """The gradient of :func:`group_norm`: of sum(dy * y) with respect to x, weight, bias and residual.

    With xhat = (x - mean) * rstd, dy' = dy * activation'(xhat * weight + bias + residual), and a and b the means
    of weight * dy' and weight * dy' * xhat over a slab::

        dbias = sum(dy')     dweight = sum(dy' * xhat)     dx = rstd * (weight * dy' - a - xhat * b)

    Parameters
    ----------
    dy : array_like, x's shape
        The gradient with respect to y; any float dtype, any order of memory.
    x, num_groups, weight, bias, eps, axis, residual, activation, mask
        As for :func:`group_norm`, with the values of the forward call.
    moments : Moments, shape (N, G), optional
        x's statistics as the forward call returned them; without them they are computed again, in one more sweep.
    out : ndarray, x's shape and dtype, optional
        Where to write dx. It may be dy or x itself; it must not overlap x in part.
    num_threads : int, optional
        As for :func:`group_norm`.

    Returns
    -------
    dx : ndarray
        `out`, or a new array of x's shape, dtype and order of memory.
    dweight, dbias : ndarray or None
        Of weight's and bias's shape and dtype, summed in float64 in a fixed order; None where they are absent.
    dresidual : ndarray
        Only if `residual` is given: dy' in x's dtype.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it; `out` is then as it was.
    MemoryError
        If there is no memory for the results.

    Notes
    -----
    The sums are those of dy' and dy' * (x - mean), centred: sum(dy' * x) would lose the digits that the mean and
    x have in common. Masked positions receive gradient through their own y, but none through the statistics, in
    which they did not count. Wu and He, "Group Normalization", 2018, arXiv:1803.08494; the derivation is that of
    Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3, over a slab.

    Examples
    --------
    >>> import numpy as np
    >>> import gn_fast
    >>> rng = np.random.default_rng(0)
    >>> x, dy = rng.standard_normal((2, 2, 4, 3))
    >>> dx, dweight, dbias = gn_fast.group_norm_backward(dy, x, 2, weight=np.ones(4))
    >>> dx.shape, dweight.shape, dbias
    ((2, 4, 3), (4,), None)
    """
    cdef Call call
    cdef Job *job = &call.job
    cdef cnp.ndarray a = open_call(&call, x, num_groups, axis), g, dx = None, dresidual, w, b
    if out is not None:
        check_out(out, a)
        if not same_places(a, out) and shared(a, out):
            raise ValueError("out must not overlap x in part: it may be x itself, dy itself, or apart from both")
    g = like_x(&job.dy, dy, "dy", a, call.axis, out)
    w, b, alive, num_threads, statistics = read_options(
        &call, a, weight, bias, eps, residual, activation, mask, moments, out, num_threads)
    if statistics is None:
        add_pass(&call, &kernel.moments)
    if out is not None and cnp.PyArray_ISBEHAVED(out):
        dx = out
    else:
        dx = fresh_like(a)
    see_output(job, &job.y, dx, call.axis)
    if residual is not None:
        dresidual = fresh_like(a)
        see_output(job, &job.dresidual, dresidual, call.axis)
    # By shape only: up to 64 blocks of samples worth a share of a thread, or each sample where its own gradient is wanted.
    each = (w is not None and cnp.PyArray_NDIM(w) == 2) or (b is not None and cnp.PyArray_NDIM(b) == 2)
    job.block = 1 if each else max(1, (job.N + 63) // 64, min(job.N, WORTH_A_THREAD // 4 // max(1, job.C * job.S)))
    blocks = max(1, (job.N + job.block - 1) // job.block)
    dweight, dbias = fresh_zeros(blocks, job.C), fresh_zeros(blocks, job.C)
    job.dweight = <double *> cnp.PyArray_DATA(dweight)
    job.dbias = <double *> cnp.PyArray_DATA(dbias)
    add_pass(&call, &kernel.sums)
    add_pass(&call, &kernel.gradient)
    parameters = settle_types(job)
    call.plan.size = slopes_at(job) + 2 * job.unit_groups
    run(&call.plan, num_threads)
    result = finished(x, dx, out), summed(dweight, w, job), summed(dbias, b, job)
    return result if residual is None else (*result, finished(x, dresidual, None))

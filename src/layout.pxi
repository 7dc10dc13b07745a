# How an array lies in memory: as a kernel sees it, and whether two share memory.

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


cdef void innermost_first(cnp.ndarray a, int *order) noexcept:
    """The axes of an array as NumPy's iterator orders them, and with it a ufunc its result: by strides, innermost
    first. Axes of stride 0 or length 1 decide nothing; they stay behind those that come after them in the shape."""
    cdef int count = 0, axis, place, i
    cdef Py_ssize_t stride, other
    for axis in range(cnp.PyArray_NDIM(a) - 1, -1, -1):
        stride = deciding_stride(a, axis)
        place = count
        for i in range(count - 1, -1, -1):
            other = deciding_stride(a, order[i])
            if stride and other:
                if other <= stride:
                    break
                place = i
        for i in range(count, place, -1):
            order[i] = order[i - 1]
        order[place] = axis
        count += 1


cdef Py_ssize_t deciding_stride(cnp.ndarray a, int axis) noexcept:
    return 0 if cnp.PyArray_DIMS(a)[axis] == 1 else abs(cnp.PyArray_STRIDES(a)[axis])


cdef cnp.ndarray copied(cnp.ndarray a, dtype):
    """A copy in the same order of memory, as another dtype; what is broadcast stays so."""
    cdef bint broadcast = False
    cdef int d
    for d in range(cnp.PyArray_NDIM(a)):
        broadcast |= cnp.PyArray_STRIDES(a)[d] == 0
    if not broadcast:
        return (<object> a).astype(dtype)
    core = (<object> a)[tuple([slice(None if stride else 1) for stride in (<object> a).strides])]
    return np.broadcast_to(core.astype(dtype), shape_of(a))


cdef void leave_out(View *v) noexcept:
    """An absent array, whose addresses may be computed like those of any other."""
    v.data = NULL
    v.storage = FLOAT32
    v.itemsize = v.sample_stride = v.channel_stride = v.stride[0] = 0
    v.shape[0] = v.ndim = 1
    v.streamed = False


cdef int see_output(Job *job, View *v, cnp.ndarray a, int axis) except -1:
    """An output, streamed if it is larger than the last level cache."""
    view(v, a, axis)
    v.streamed = cnp.PyArray_NBYTES(a) > LAST_LEVEL_BYTES
    return 0


cdef cnp.ndarray like_x(View *v, value, str name, cnp.ndarray x, int axis, out):
    """See an argument of x's shape; where `out` overlaps it other than exactly, a copy of it."""
    cdef cnp.ndarray a = as_array(value, name)
    if not cnp.PyArray_SAMESHAPE(a, x):
        hint = transposed(shape_of(a), shape_of(x))
        raise ValueError(f"{name} must have x's shape {shape_of(x)}, not {shape_of(a)}{hint}")
    if out is not None and not same_places(a, out):
        a = apart(a, out)
    view(v, a, axis)
    return a


cdef tuple per_channel(View *v, value, str name, Call *call, cnp.ndarray x, out):
    """See a weight or bias as an (N, C) array whose channels lie in a row, float32 or float64. Returns it as it was
    given and as it is seen, which the caller keeps alive."""
    cdef cnp.ndarray a = as_array(value, name), given = a
    cdef bint each = has_row_of_each_sample(a, name, call, x)
    if cnp.PyArray_NDIM(a) == 0:
        a = np.full(call.job.C, a)
    if storage_of(a) == FLOAT16:
        with np.errstate(invalid="ignore"):  # of signalling NaNs, where the processor converts; takes 0.9 us
            a = (<object> a).astype(np.float32, order="C")
    elif storage_of(a) == BFLOAT16:
        a = (<object> a).astype(np.float32, order="C")
    elif not cnp.PyArray_IS_C_CONTIGUOUS(a):
        a = (<object> a).copy()
    else:
        a = apart(a, out)
    v.data = cnp.PyArray_BYTES(a)
    v.storage = <Storage> storage_of(a)
    v.itemsize = v.channel_stride = cnp.PyArray_ITEMSIZE(a)
    v.sample_stride = v.itemsize * call.job.C if each else 0
    return given, a


cdef bint has_row_of_each_sample(cnp.ndarray a, str name, Call *call, cnp.ndarray x) except -1:
    """Whether a weight or bias is of shape (N, C), and not (), (C,) or (1, C); ones for all the spatial axes may
    follow, but not for some of them. No shape has two meanings: where two of these are alike, N or C is 1."""
    cdef Job *job = &call.job
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(a)
    cdef int ndim = cnp.PyArray_NDIM(a), spatial = cnp.PyArray_NDIM(x) - 2, short = ndim - spatial
    cdef bint followed = only_ones(shape, short, ndim)
    if ndim == 0 or is_row(shape, ndim, job) or (followed and is_row(shape, short, job)):
        return False
    if is_table(shape, ndim, job) or (followed and is_table(shape, short, job)):
        return True
    ones = f", or with ones for the spatial axes, as {(job.N, job.C) + (1,) * spatial}" if spatial else ""
    hint = one_sample(job.N) if call.axis == 1 and ndim and shape[0] == job.N == cnp.PyArray_SIZE(a) else ""
    raise ValueError(f"{name} must be a scalar or have shape (1, {job.C}), ({job.C},) or ({job.N}, {job.C}){ones}, "
                     f"not {shape_of(a)}{hint}")


cdef bint is_row(const cnp.npy_intp *shape, int ndim, const Job *job) noexcept:
    return (ndim == 1 or (ndim == 2 and shape[0] == 1)) and shape[ndim - 1] == job.C


cdef bint is_table(const cnp.npy_intp *shape, int ndim, const Job *job) noexcept:
    return ndim == 2 and shape[0] == job.N and shape[1] == job.C


cdef bint only_ones(const cnp.npy_intp *shape, int start, int stop) noexcept:
    cdef int d
    for d in range(max(start, 0), stop):
        if shape[d] != 1:
            return False
    return True


cdef bint has_rows(const View *v) noexcept:
    """Whether a weight or bias has a row for each sample."""
    return v.data != NULL and v.sample_stride != 0


cdef cnp.ndarray apart(cnp.ndarray a, cnp.ndarray out):
    """An input that is safe to read while `out` is written: itself, or a copy if they overlap in part."""
    if out is None or not shared(a, out):
        return a
    return copied(a, (<object> a).dtype)


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


cdef bint same_places(cnp.ndarray a, cnp.ndarray b):
    """Whether each element of a lies exactly where b's does: then b is overwritten only after a was read."""
    cdef int d
    if cnp.PyArray_BYTES(a) != cnp.PyArray_BYTES(b) or cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(b):
        return False
    for d in range(cnp.PyArray_NDIM(b)):
        if cnp.PyArray_STRIDES(a)[d] != cnp.PyArray_STRIDES(b)[d] and cnp.PyArray_DIMS(b)[d] > 1:
            return False
    return True

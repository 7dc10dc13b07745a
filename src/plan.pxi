# What a call is to do: its arguments as a Job, the order of the work, and the passes.

cdef enum:
    CHUNK = 1 << 16  # values, so that 256 KiB of float32 are swept again from a core's level 2 cache
    MAX_CHUNKS = 256  # of a unit: bounds what a unit's chunks found
    UNIT = 1 << 12  # values of several groups that make a unit, so that little time goes from one to the next

cdef struct Call:
    Job job
    Plan plan
    int axis


cdef cnp.ndarray open_call(Call *call, x, num_groups, axis):
    """x as an array; the call gets its shape, strides and walk."""
    cdef cnp.ndarray a = as_array(x, "x")
    cdef Job *job = &call.job
    leave_out(&job.y)
    leave_out(&job.weight)
    leave_out(&job.bias)
    leave_out(&job.residual)
    leave_out(&job.mask)
    leave_out(&job.dy)
    leave_out(&job.dresidual)
    job.count = NULL
    job.mean = job.m2 = NULL
    job.activation = IDENTITY
    job.leak = 0
    job.channels_last = False
    job.unit_groups = job.units = job.chunks = job.pieces = job.block = 1
    view_x(job, a, num_groups, axis, &call.axis)
    call.plan.job = job
    call.plan.kernel = <const Kernel *> gn_load(&kernel_in_use)
    call.plan.count = 0
    call.plan.size = 4 * job.unit_groups
    return a


cdef int view_x(Job *job, cnp.ndarray x, num_groups, axis_argument, int *axis_out) except -1:
    cdef Py_ssize_t ndim = cnp.PyArray_NDIM(x), axis, size = 1, d
    if ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions, samples and channels, not shape {shape_of(x)}"
                         f"{': x[None] makes it one sample' if ndim == 1 else ''}")
    axis = integer(axis_argument, "axis")
    if not -ndim <= axis < ndim or axis % ndim == 0:
        hint = ", which is the samples': x[None] is one sample" if axis in (0, -ndim) else ""
        raise ValueError(f"axis must be the channels' of {ndim} dimensions and not the first, not {axis}{hint}")
    axis = (axis + ndim) % ndim
    job.N = cnp.PyArray_DIMS(x)[0]
    job.C = cnp.PyArray_DIMS(x)[axis]
    job.G = integer(num_groups, "num_groups")
    if job.G < 1:
        hint = f": num_groups={job.C} is one channel to a group" if job.C else ""
        raise ValueError(f"num_groups must be at least 1, not {job.G}{hint}")
    if job.C % job.G:
        hint = one_sample(job.N) if axis == 1 and ndim == 3 and job.N % job.G == 0 else ""
        raise ValueError(f"num_groups must divide the number of channels, {job.C}, not be {job.G}{hint}")
    job.K = job.C // job.G
    for d in range(1, ndim):
        if d != axis:
            size *= cnp.PyArray_DIMS(x)[d]
    job.S = size
    axis_out[0] = axis
    view(&job.x, x, axis)
    if job.N * job.C * job.S:
        plan_walk(job, x, axis)
    return 0


cdef str one_sample(Py_ssize_t channels):
    """The end of an error's message about what fits the first axis of x better than the second."""
    return f": if x is one sample of {channels} channels, pass x[None]"


cdef bint innermost(cnp.ndarray x, int axis) noexcept:
    """Whether the channels lie within the positions, in the order of memory that the result has."""
    cdef int order[MAX_SPATIAL + 2]
    cdef int ndim = cnp.PyArray_NDIM(x), i
    if cnp.PyArray_IS_C_CONTIGUOUS(x) and axis < ndim - 1 and cnp.PyArray_DIMS(x)[ndim - 1] > 1:
        return False  # most often; without this a call of 0.78 us takes 0.84
    innermost_first(x, order)
    for i in range(ndim):
        if order[i] != 0 and cnp.PyArray_DIMS(x)[order[i]] > 1:
            return order[i] == axis
    return False


cdef int plan_walk(Job *job, cnp.ndarray x, int axis) except -1:
    """Choose the walk, the units of work and the chunks: by shape and order of memory only, since bits depend on
    them."""
    cdef Py_ssize_t channels
    job.channels_last = job.S > 1 and job.C > 1 and innermost(x, axis)
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
        job.leak = checked_slope(activation if has_slope(activation) else ("leaky_relu", 0.01), compute_type(job))
    if weight is not None:
        w, seen_weight = per_channel(&job.weight, weight, "weight", call, x, out)
    if bias is not None:
        b, seen_bias = per_channel(&job.bias, bias, "bias", call, x, out)
    if residual is not None:
        r = like_x(&job.residual, residual, "residual", x, call.axis, out)
    if mask is not None:
        m = apart(checked_mask(mask, x, call.axis), out)
        view(&job.mask, m, call.axis)
    if moments is not None:
        moments = checked_moments(job, moments, out)
        use_moments(job, moments)
        add_pass(call, &call.plan.kernel.given)
    return w, b, (r, m, seen_weight, seen_bias), num_threads, moments


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


cdef checked_sums(Job *job, sums, moments):
    if not isinstance(sums, GradientSums):
        raise TypeError(f"sums must be gn_fast.GradientSums, not {type(sums).__name__}")
    if sums.dbias.shape != (job.N, job.C):
        raise ValueError(f"sums must have shape ({job.N}, {job.C}), samples and channels, not {sums.dbias.shape}")
    if moments is None:
        raise ValueError("sums must come with moments, the statistics that they were taken with, not with moments=None")
    return sums


cdef int use_moments(Job *job, moments) except -1:
    """Point the job at the arrays of these Moments, which the caller keeps alive."""
    job.count = <int64_t *> cnp.PyArray_DATA(moments.count)
    job.mean = <double *> cnp.PyArray_DATA(moments.mean)
    job.m2 = <double *> cnp.PyArray_DATA(moments.m2)
    return 0


cdef empty_moments(Job *job):
    shape = (job.N, job.G)
    return Moments._trusted(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))


cdef tuple find_sums(Call *call, Py_ssize_t block):
    """Add the pass that finds the gradient's sums. Returns dweight and dbias, a row for each block of samples."""
    cdef Job *job = &call.job
    job.block = block
    blocks = max(1, (job.N + block - 1) // block)
    add_pass(call, &call.plan.kernel.sums)
    return use_sums(call, fresh_zeros(blocks, max(1, job.C)), fresh_zeros(blocks, max(1, job.C)))


cdef tuple take_sums(Call *call, sums):
    """Add the pass that reads the gradient's sums. Returns copies: they are added up in place."""
    cdef Job *job = &call.job
    job.block = 1
    dweight, dbias = fresh_zeros(max(1, job.N), max(1, job.C)), fresh_zeros(max(1, job.N), max(1, job.C))
    (<object> dweight)[:job.N, :job.C] = sums.dweight
    (<object> dbias)[:job.N, :job.C] = sums.dbias
    add_pass(call, &call.plan.kernel.given_sums)
    return use_sums(call, dweight, dbias)


cdef tuple use_sums(Call *call, cnp.ndarray dweight, cnp.ndarray dbias):
    """Point the job at these arrays, which the caller keeps alive."""
    call.job.dweight = <double *> cnp.PyArray_DATA(dweight)
    call.job.dbias = <double *> cnp.PyArray_DATA(dbias)
    call.plan.size = slopes_at(&call.job) + 2 * call.job.unit_groups
    return dweight, dbias


cdef settle_types(Call *call):
    """Choose the type that a tile holds, and give short channels a weight and a bias for each value; the caller keeps
    what is returned alive."""
    cdef Job *job = &call.job
    cdef cnp.ndarray weights = None, biases = None
    cdef Py_ssize_t values = job.C * job.S
    cdef bint gradient = job.dy.data != NULL, short = job.S < SHORT and not job.channels_last
    job.work = job.x.storage
    if (not (in_type(&job.residual, job.work) and in_type(&job.dy, job.work) and in_type(&job.dresidual, job.work))
            or (gradient and (job.activation != IDENTITY or job.mask.data != NULL or job.residual.data != NULL))):
        job.work = compute_type(job)
    if short and not call.plan.kernel.weights_carried(job):
        job.work = FLOAT64
    if short and values:
        number = cnp.NPY_DOUBLE if job.work == FLOAT64 else cnp.NPY_FLOAT
        if not each_has_its_own(job, &job.weight):
            weights = empty_row(expanded_size(job, &job.weight), number)
        if not each_has_its_own(job, &job.bias):
            biases = empty_row(expanded_size(job, &job.bias), number)
        call.plan.kernel.expand(job, NULL if weights is None else cnp.PyArray_DATA(weights),
                                NULL if biases is None else cnp.PyArray_DATA(biases))
    return weights, biases


cdef Storage compute_type(const Job *job):
    return FLOAT64 if job.x.storage == FLOAT64 else FLOAT32


cdef bint in_type(const View *v, Storage storage):
    return v.data == NULL or v.storage == storage


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

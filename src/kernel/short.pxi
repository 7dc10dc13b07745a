# Channels of fewer than SHORT positions, down to those of arrays of two dimensions: a scale and a shift would be used a
# few times only, so each value has its weight and bias, expanded once for all samples (Job.weights, Job.biases).

cdef void expand_sample(const Job *job, const View *v, Py_ssize_t n, double absent, void *to, vec like) noexcept nogil:
    """A weight or bias for each value of a sample; of absent ones, as many as a tile has at most."""
    cdef Py_ssize_t c, s, i = 0
    cdef double value
    if v.data == NULL:
        for i in range(min(job.C * job.S, SHORT_TILE)):
            put(to, i, absent, like)
        return
    for c in range(job.C):
        read_channels(v, n, c, 1, absent, &value)
        for s in range(job.S):
            put(to, i, value, like)
            i += 1


cdef void *expand_view(const Job *job, const View *v, double absent, void *to, Py_ssize_t *step,
                       Py_ssize_t *size) noexcept nogil:
    """Fill the memory that is given for a weight or bias of each value; where none is, they lie ready."""
    cdef Py_ssize_t n
    size[0] = 8 if job.work == FLOAT64 else 4
    step[0] = v.sample_stride * job.S if v.data != NULL else 0
    if to == NULL:
        return v.data
    step[0] = 0 if v.data == NULL or v.sample_stride == 0 else job.C * job.S * size[0]
    for n in range(job.N if step[0] else 1):
        if job.work == FLOAT64:
            expand_sample(job, v, n, absent, <char *> to + n * step[0], gn_all_doubles(0))
        else:
            expand_sample(job, v, n, absent, <char *> to + n * step[0], gn_all_floats(0))
    if v.data == NULL:
        size[0] = 0
    return to


cdef void expand(Job *job, void *weights, void *biases) noexcept nogil:
    """The parameters of short channels."""
    job.weights = expand_view(job, &job.weight, 1, weights, &job.weight_step, &job.weight_size)
    job.biases = expand_view(job, &job.bias, 0, biases, &job.bias_step, &job.bias_size)


cdef bint weights_carried(const Job *job) noexcept nogil:
    """Whether float32 may carry all weights, and has all bits of the parameters."""
    cdef Py_ssize_t n, c
    cdef double weight
    cdef bint ok = True
    if (job.weight.data != NULL and job.weight.storage == FLOAT64) or (job.bias.data != NULL and job.bias.storage == FLOAT64):
        return False
    for n in range(job.N if job.weight.data != NULL and job.weight.sample_stride else 1):
        for c in range(job.C if job.weight.data != NULL else 0):
            weight = (<const float *> (job.weight.data + n * job.weight.sample_stride))[c]
            ok &= comfortable(weight * 2.0 ** 20) and comfortable(weight * 2.0 ** -20)  # times a gradient's rstd, too
    return ok


cdef struct Short:  # a chunk's part of a unit: whole groups, or a part of one
    Span t  # all of it, or of the tile that is at work
    Py_ssize_t i, groups, values  # its first value in the sample; values of each group
    Values a
    const char *weights  # of the sample
    const char *biases
    double *mean  # of the groups of the unit, and what follows from their statistics
    double *rstd
    double *rest
    double *slope
    double *constant


cdef Short short_of(const Task *task, const double *slopes, vec like) noexcept nogil:
    """All groups of a unit. Without slopes, what y needs only."""
    cdef const Job *job = task.job
    cdef const double *pivot = task.known + PIVOT * job.unit_groups
    cdef Unit u = unit_of(job, task.unit)
    cdef Part part = part_of(job, &u, task.chunk, 0)
    cdef Py_ssize_t n = u.groups, g
    cdef Short p
    p.t = span_of(&part)
    p.i = part.c * job.S + part.s
    p.groups = p.a.groups = n
    p.values = p.t.lanes
    p.t.lanes *= n
    p.weights = <const char *> job.weights + u.n * job.weight_step
    p.biases = <const char *> job.biases + u.n * job.bias_step
    p.mean = task.scratch.channels + 2 * SHORT_TILE
    p.rest = p.mean + n
    p.slope = p.mean + 2 * n
    p.constant = p.mean + 3 * n
    p.rstd = p.mean + 4 * n
    p.a.leak = job.leak
    rstds_of(job, task.known, n, p.rstd)
    for g in range(n):
        p.mean[g] = in_type(pivot[g], like)
        p.rest[g] = -rest_of(pivot[g], like) * p.rstd[g] if vec is floats else 0  # an infinite rstd makes no NaN of its own
    for g in range(n if slopes != NULL else 0):
        p.slope[g] = p.rstd[g] * p.rstd[g] * slopes[2 * g + 1]
        p.constant[g] = p.rstd[g] * slopes[2 * g] - p.slope[g] * rest_of(pivot[g], like)
    return p


cdef inline void set_parameters(const Job *job, Short *p, Py_ssize_t g, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """Of n values of a group, of which the first is the i-th of the sample."""
    p.a.values = n
    p.a.mean = p.mean + g
    p.a.rstd = p.rstd + g
    p.a.rest = p.rest + g
    p.a.slope = p.slope + g
    p.a.constant = p.constant + g
    p.a.weight = p.weights + i * job.weight_size
    p.a.bias = p.biases + i * job.bias_size


cdef inline void set_tile(const Job *job, Short *p, Py_ssize_t g, Py_ssize_t first, const Scratch *scratch,
                          vec like) noexcept nogil:
    """Some values of a group, and their parameters in the type that they are computed in."""
    cdef Py_ssize_t i = p.i + g * p.values + first, j
    p.t.c = i // job.S
    p.t.s = i % job.S
    p.t.lanes = min(SHORT_TILE, p.values - first)
    set_parameters(job, p, g, i, p.t.lanes)
    if vec is doubles and job.work != FLOAT64:
        for j in range(p.t.lanes):
            (<double *> scratch.weight)[j] = (<const float *> p.a.weight)[j]
            (<double *> scratch.bias)[j] = (<const float *> p.a.bias)[j]
        p.a.weight = scratch.weight
        p.a.bias = scratch.bias


cdef inline bint lies_ready(const Job *job, const Short *p, const View *v, const stored *_) noexcept nogil:
    """Whether all values lie in a row, in this type; or the array is absent."""
    return v.data == NULL or (v.storage == storage_as(_) and in_one_run(job, v, &p.t))


cdef inline bint all_ready(const Job *job, const Short *p, const View *other, const stored *_) noexcept nogil:
    """Whether all values, x, the other and the parameters, can be used where they lie."""
    return (((job.weight_size != 0 and job.bias_size != 0) or p.t.lanes <= SHORT_TILE)
            and lies_ready(job, p, &job.x, _) and lies_ready(job, p, other, _))


cdef inline bint short_carried(const Short *p, Py_ssize_t g, bint sloped) noexcept nogil:
    return comfortable(p.mean[g]) and comfortable(p.rstd[g]) and (
        not sloped or (sums_carried(p.rstd[g], p.mean[g]) and comfortable(p.slope[g])))


cdef inline void widen_group(Short *p, const double *known, Py_ssize_t g, const double *slopes) noexcept nogil:
    """Its parameters without what float32 would leave out."""
    p.mean[g] = known[PIVOT * p.groups + g]
    p.rest[g] = 0
    if slopes != NULL:
        p.constant[g] = p.rstd[g] * slopes[2 * g]


# ---- y and dx --------------------------------------------------------------------------------------


cdef void apply_group(const Task *task, int kind, Short *p, Py_ssize_t g, const stored *_, vec like) noexcept nogil:
    cdef Py_ssize_t first
    for first from 0 <= first < p.values by SHORT_TILE:
        set_tile(task.job, p, g, first, task.scratch, like)
        apply_tile(task, VALUES, kind, &p.t, &p.a, _, like)


cdef void short_apply(const Task *task, int kind, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const View *other = &job.dy if kind == DX else &job.residual
    cdef const double *slopes = task.known + slopes_at(job) if kind == DX else NULL
    cdef Short p = short_of(task, slopes, like)
    cdef Py_ssize_t g
    cdef bint carried = True
    for g in range(p.groups if vec is floats else 0):
        carried &= short_carried(&p, g, slopes != NULL)
    if (carried and all_ready(job, &p, other, _) and lies_ready(job, &p, &job.y, _) and not job.y.streamed
            and (kind != DX or plain_dx(task, NULL))):
        set_parameters(job, &p, 0, p.i, p.values)
        apply_values(kind, start_of(&job.x, &p.t, _), start_of(other, &p.t, _), <stored *> start_of(&job.y, &p.t, _),
                     &p.a, like)
        return
    p.a.groups = 1
    for g in range(p.groups):
        if vec is doubles or short_carried(&p, g, slopes != NULL):
            apply_group(task, kind, &p, g, _, like)
        else:
            widen_group(&p, task.known, g, slopes)
            apply_group(task, kind, &p, g, <const double *> NULL, gn_all_doubles(0))


# ---- the gradient's sums, in float64: with a parameter for each value there is little to be gained ----------------


cdef inline doubles weight_at(const void *weight, Py_ssize_t i, const stored *_) noexcept nogil:
    if stored is double:
        return gn_doubles_of_double(<const double *> weight + i)
    else:
        return gn_doubles_of_float(<const float *> weight + i)


cdef inline void add_short(const stored *x, const stored *dy, const Values *t, double mean, double *dbias, double *dweight,
                           double *sums) noexcept nogil:
    """Add each value's share of dbias and dweight, and in LANES lanes weight times these, of one group."""
    cdef doubles m = gn_all_doubles(mean), rstd = gn_all_doubles(t.rstd[0]), v, d, w
    cdef doubles a[LANES]
    cdef doubles b[LANES]
    cdef double weight
    cdef Py_ssize_t i = 0, j, k, r
    for k in range(LANES // DOUBLES):
        a[k] = b[k] = gn_all_doubles(0)
    for r in range(t.values // LANES):
        for k in range(LANES // DOUBLES):
            v = load(dy + i, m)
            d = v * ((load(x + i, m) - m) * rstd)
            w = weight_at(t.weight, i, x)
            gn_add_doubles(dbias + i, v)
            gn_add_doubles(dweight + i, d)
            a[k] = fma(w, v, a[k])
            b[k] = fma(w, d, b[k])
            i += DOUBLES
    for k in range(LANES // DOUBLES):
        gn_add_doubles(sums + k * DOUBLES, a[k])
        gn_add_doubles(sums + LANES + k * DOUBLES, b[k])
    for j in range(t.values % LANES):
        weight = (<const double *> t.weight)[i] if stored is double else (<const float *> t.weight)[i]
        dbias[i] += scalar(dy[i])
        sums[j] += weight * scalar(dy[i])
        dweight[i] += scalar(dy[i]) * ((scalar(x[i]) - mean) * t.rstd[0])
        sums[LANES + j] += weight * (scalar(dy[i]) * ((scalar(x[i]) - mean) * t.rstd[0]))
        i += 1


cdef void add_by_channel(const Job *job, Py_ssize_t first, Py_ssize_t n, const double *each, double *to) noexcept nogil:
    """Add values, the first of which lies so far in the sample, to those of their channels."""
    cdef Py_ssize_t c = first // job.S, run = job.S - first % job.S, i = 0, j
    cdef double sum
    while i < n:
        run = min(run, n - i)
        sum = 0
        for j in range(i, i + run):
            sum += each[j]
        to[c] += sum
        c += 1
        i += run
        run = job.S


cdef void sum_group(const Task *task, Short *p, Py_ssize_t g, double *lanes, const stored *_, vec like) noexcept nogil:
    """One group, tile by tile."""
    cdef const Job *job = task.job
    cdef double *each = task.scratch.channels
    cdef double *dbias = job.dbias + p.t.n // job.block * job.C
    cdef double *dweight = job.dweight + p.t.n // job.block * job.C
    cdef double mean = task.known[PIVOT * p.groups + g]
    cdef const stored *x
    cdef const stored *dy
    cdef Py_ssize_t first, i
    for first from 0 <= first < p.values by SHORT_TILE:
        i = p.i + g * p.values + first
        set_tile(job, p, g, first, task.scratch, like)
        x = x_of(job, &p.t, task.scratch, _)
        dy = gradient_tile(task, VALUES, &p.t, x, &p.a, like)
        if job.S == 1:
            add_short(x, dy, &p.a, mean, dbias + i, dweight + i, lanes)
        else:
            memset(each, 0, p.a.values * sizeof(double))
            memset(each + SHORT_TILE, 0, p.a.values * sizeof(double))
            add_short(x, dy, &p.a, mean, each, each + SHORT_TILE, lanes)
            add_by_channel(job, i, p.a.values, each, dbias)
            add_by_channel(job, i, p.a.values, each + SHORT_TILE, dweight)


cdef void sum_groups(const Task *task, Short *p, double *slopes, const stored *_, vec like) noexcept nogil:
    """All groups of channels of one position, as they lie in memory."""
    cdef const Job *job = task.job
    cdef double lanes[2 * LANES]
    cdef double *dbias = job.dbias + p.t.n // job.block * job.C + p.i
    cdef double *dweight = job.dweight + p.t.n // job.block * job.C + p.i
    cdef const double *mean = task.known + PIVOT * p.groups
    cdef const stored *x = start_of(&job.x, &p.t, _)
    cdef const stored *dy = start_of(&job.dy, &p.t, _)
    cdef Py_ssize_t g, i = 0
    p.a.values = p.values
    for g in range(p.groups):
        memset(lanes, 0, sizeof(lanes))
        p.a.rstd = p.rstd + g
        p.a.weight = p.weights + (p.i + i) * job.weight_size
        add_short(x + i, dy + i, &p.a, mean[g], dbias + i, dweight + i, lanes)
        gn_total(lanes, &slopes[2 * g], &slopes[2 * g + 1])
        i += p.values


cdef void short_sums(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef Short p = short_of(task, NULL, like)
    cdef double lanes[2 * LANES]
    cdef double *slopes = task.found + slopes_at(job)
    cdef Py_ssize_t g
    if job.S == 1 and plain_gradient(job) and p.values <= SHORT_TILE and all_ready(job, &p, &job.dy, _):
        sum_groups(task, &p, slopes, _, like)
        return
    p.a.groups = 1
    for g in range(p.groups):
        memset(lanes, 0, sizeof(lanes))
        if vec is doubles or job.activation == IDENTITY or short_carried(&p, g, False):
            sum_group(task, &p, g, lanes, _, like)
        else:
            widen_group(&p, task.known, g, NULL)
            sum_group(task, &p, g, lanes, <const double *> NULL, gn_all_doubles(0))
        gn_total(lanes, &slopes[2 * g], &slopes[2 * g + 1])

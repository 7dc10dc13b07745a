# Channels of fewer than SHORT positions, down to those of arrays of two dimensions: a scale and a shift would be used a few
# times only, so each value has its weight and bias, expanded once for all samples (Job.weights, Job.biases).

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
            ok &= comfortable(weight)
    return ok


cdef struct Short:  # a chunk's part of a unit: whole groups, or a part of one
    Span t
    Py_ssize_t i, left  # its next value in the sample, and how many there are from there on
    Values a
    const char *weights  # of the sample
    const char *biases
    double *mean  # of the groups of the unit, and what follows from their statistics; those of the part are in `a`
    double *rstd
    double *rest
    double *slope
    double *constant


cdef Short short_of(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, const double *slopes,
                    const Scratch *scratch, vec like) noexcept nogil:
    """All groups of a unit. Without slopes, what y needs only."""
    cdef Unit u = unit_of(job, unit)
    cdef Part part = part_of(job, &u, chunk, 0)
    cdef Py_ssize_t n = u.groups, g
    cdef Short p
    p.t = span_of(&part)
    p.t.lanes *= n
    p.i = part.c * job.S + part.s
    p.left = p.t.lanes
    p.weights = <const char *> job.weights + u.n * job.weight_step
    p.biases = <const char *> job.biases + u.n * job.bias_step
    p.mean = scratch.channels + 2 * SHORT_TILE
    p.rest = p.mean + n
    p.slope = p.mean + 2 * n
    p.constant = p.mean + 3 * n
    p.rstd = p.mean + 4 * n
    rstds_of(job, known, n, p.rstd)
    for g in range(n):
        p.mean[g] = in_type(known[PIVOT * n + g], like)
        p.rest[g] = (p.mean[g] - known[PIVOT * n + g]) * p.rstd[g]
    for g in range(n if slopes != NULL else 0):
        p.slope[g] = p.rstd[g] * p.rstd[g] * slopes[2 * g + 1]
        p.constant[g] = p.rstd[g] * slopes[2 * g] - p.slope[g] * (known[PIVOT * n + g] - p.mean[g])
    set_group(job, &p, 0, n, p.left // n)
    p.a.weight = p.weights + p.i * job.weight_size
    p.a.bias = p.biases + p.i * job.bias_size
    return p


cdef inline void set_group(const Job *job, Short *p, Py_ssize_t g, Py_ssize_t groups, Py_ssize_t values) noexcept nogil:
    p.a.groups = groups
    p.a.values = values
    p.a.mean = p.mean + g
    p.a.rstd = p.rstd + g
    p.a.rest = p.rest + g
    p.a.slope = p.slope + g
    p.a.constant = p.constant + g


cdef inline bint lies_ready(const Job *job, const Short *p, const View *v, const stored *_) noexcept nogil:
    """Whether all values of the part lie in a row, in this type; or the array is absent."""
    return v.data == NULL or (v.storage == storage_as(_) and in_one_run(job, v, &p.t))


cdef inline bint parameters_ready(const Job *job, const Short *p) noexcept nogil:
    return (job.weight_size != 0 and job.bias_size != 0) or p.left <= SHORT_TILE


cdef inline bint all_comfortable(const Short *p, Py_ssize_t groups, bint sloped) noexcept nogil:
    cdef Py_ssize_t g
    cdef bint ok = True
    for g in range(groups):
        ok &= comfortable(p.mean[g]) and comfortable(p.rstd[g])
    for g in range(groups if sloped else 0):
        ok &= 2.0 ** -40 < p.rstd[g] < 2.0 ** 40 and abs(p.slope[g]) < 2.0 ** 100
    return ok


cdef inline bint next_values(const Job *job, Short *p, Py_ssize_t *left, const Scratch *scratch,
                             vec like) noexcept nogil:
    """Set the span to the next values of a group and point to their parameters, in the type that they are computed in."""
    cdef Py_ssize_t j
    if left[0] == 0:
        return False
    p.t.lanes = p.a.values = min(left[0], SHORT_TILE)
    p.a.weight = p.weights + p.i * job.weight_size
    p.a.bias = p.biases + p.i * job.bias_size
    if vec is doubles and job.work != FLOAT64:
        for j in range(p.t.lanes):
            (<double *> scratch.weight)[j] = (<const float *> p.a.weight)[j]
            (<double *> scratch.bias)[j] = (<const float *> p.a.bias)[j]
        p.a.weight = scratch.weight
        p.a.bias = scratch.bias
    left[0] -= p.t.lanes
    return True


cdef inline void past_values(const Job *job, Short *p) noexcept nogil:
    p.i += p.t.lanes
    forward(job, &p.t, p.t.lanes)


# ---- y ---------------------------------------------------------------------------------------------


cdef void short_affine_tiles(const Job *job, Short *p, Py_ssize_t left, const Scratch *scratch, const stored *_,
                             vec like) noexcept nogil:
    """One group."""
    cdef const stored *residual = NULL
    cdef const stored *x
    cdef stored *y
    cdef Py_ssize_t row
    while next_values(job, p, &left, scratch, like):
        x = load_tile(job, &job.x, &p.t, <stored *> scratch.x, &row)
        if job.residual.data != NULL:
            residual = load_tile(job, &job.residual, &p.t, <stored *> scratch.y, &row)
        y = target(job, &job.y, &p.t, <stored *> scratch.y)
        affine_values(x, residual, y, &p.a, job.activation, like)
        if y == <stored *> scratch.y:
            move(job, &job.y, &p.t, y, True)
        past_values(job, p)


cdef void short_affine(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef Short p = short_of(job, task.unit, task.chunk, known, NULL, scratch, like), wide
    cdef Py_ssize_t groups = p.a.groups, values = p.a.values, g
    cdef const stored *residual = NULL
    if (lies_ready(job, &p, &job.x, _) and lies_ready(job, &p, &job.y, _) and lies_ready(job, &p, &job.residual,
                                                                                         _) and not job.y.streamed
            and parameters_ready(job, &p) and (vec is doubles or all_comfortable(&p, groups, False))):
        if job.residual.data != NULL:
            residual = <const stored *> address(&job.residual, p.t.n, p.t.c, p.t.s)
        affine_values(<const stored *> address(&job.x, p.t.n, p.t.c, p.t.s), residual, <stored *> address(&job.y,
                                                                                                          p.t.n, p.t.c, p.t.s),
                      &p.a, job.activation, like)
        return
    for g in range(groups):
        set_group(job, &p, g, 1, values)
        if vec is doubles or (comfortable(p.mean[g]) and comfortable(p.rstd[g])):
            short_affine_tiles(job, &p, values, scratch, _, like)
        else:
            wide = p
            widen_group(&wide, known, groups, g, NULL)
            short_affine_tiles(job, &wide, values, scratch, <const double *> NULL, gn_all_doubles(0))
            p.i += values
            forward(job, &p.t, values)


cdef inline void widen_group(Short *p, const double *known, Py_ssize_t groups, Py_ssize_t g,
                             const double *slopes) noexcept nogil:
    """Its parameters without what float32 would leave out."""
    p.mean[g] = known[PIVOT * groups + g]
    p.rest[g] = 0
    if slopes != NULL:
        p.constant[g] = p.rstd[g] * slopes[2 * g]


# ---- the gradient, whose sums are taken in float64: with a parameter for each value there is little to be gained ------


cdef void short_gradient_tile(const Job *job, Short *p, const Scratch *scratch, const stored **x, const stored **dy,
                              vec like) noexcept nogil:
    cdef const stored *residual = NULL
    cdef Py_ssize_t row
    x[0] = load_tile(job, &job.x, &p.t, <stored *> scratch.x, &row)
    if job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL:
        dy[0] = load_tile(job, &job.dy, &p.t, <stored *> scratch.dy, &row)
        return
    if job.activation != IDENTITY:
        if job.residual.data != NULL:
            residual = load_tile(job, &job.residual, &p.t, <stored *> scratch.y, &row)
        affine_values(x[0], residual, <stored *> scratch.y, &p.a, IDENTITY, like)
    gradient_tile(job, &p.t, scratch.y, scratch, x, dy, like)


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


cdef void short_sums(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef double *found = task.found
    cdef Short p = short_of(job, task.unit, task.chunk, known, NULL, scratch, like)
    cdef Py_ssize_t groups = p.a.groups, values = p.a.values, g, i, left
    cdef double lanes[2 * LANES]
    cdef double *each = scratch.channels
    cdef double *slopes = found + slopes_at(job)
    cdef double *dbias = job.dbias + p.t.n // job.block * job.C
    cdef double *dweight = job.dweight + p.t.n // job.block * job.C
    cdef const stored *x
    cdef const stored *dy
    if (job.S == 1 and values <= SHORT_TILE and (vec is doubles or job.work != FLOAT64) and parameters_ready(job,
                                                                                                             &p) and plain_gradient(job, _)
            and lies_ready(job, &p, &job.x, _) and lies_ready(job, &p, &job.dy, _)):
        x = <const stored *> address(&job.x, p.t.n, p.t.c, p.t.s)
        dy = <const stored *> address(&job.dy, p.t.n, p.t.c, p.t.s)
        for g in range(groups):
            i = g * values
            memset(lanes, 0, sizeof(lanes))
            set_group(job, &p, g, 1, values)
            p.a.weight = p.weights + (p.i + i) * job.weight_size
            add_short(x + i, dy + i, &p.a, known[PIVOT * groups + g], dbias + p.i + i, dweight + p.i + i, lanes)
            gn_total(lanes, &slopes[2 * g], &slopes[2 * g + 1])
        return
    for g in range(groups):
        set_group(job, &p, g, 1, values)
        memset(lanes, 0, sizeof(lanes))
        left = values
        while next_values(job, &p, &left, scratch, like):
            short_gradient_tile(job, &p, scratch, &x, &dy, like)
            if job.S == 1:
                add_short(x, dy, &p.a, known[PIVOT * groups + g], dbias + p.i, dweight + p.i, lanes)
            else:
                memset(each, 0, p.a.values * sizeof(double))
                memset(each + SHORT_TILE, 0, p.a.values * sizeof(double))
                add_short(x, dy, &p.a, known[PIVOT * groups + g], each, each + SHORT_TILE, lanes)
                add_by_channel(job, p.i, p.a.values, each, dbias)
                add_by_channel(job, p.i, p.a.values, each + SHORT_TILE, dweight)
            past_values(job, &p)
        gn_total(lanes, &slopes[2 * g], &slopes[2 * g + 1])


cdef void short_dx_tiles(const Job *job, const Unit *u, Short *p, Py_ssize_t left, const double *known,
                         const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    """One group."""
    cdef const stored *x
    cdef const stored *dy
    cdef stored *dx
    while next_values(job, p, &left, scratch, like):
        short_gradient_tile(job, p, scratch, &x, &dy, like)
        dx = target(job, &job.y, &p.t, <stored *> scratch.y)
        dx_values(x, dy, dx, &p.a, like)
        if known[COUNT * u.groups + p.t.c // job.K - u.first] == 0 or job.mask.data != NULL:
            unmoved(job, u, &p.t, dy, dx, known, scratch)
        if dx == <stored *> scratch.y:
            move(job, &job.y, &p.t, dx, True)
        if job.dresidual.data != NULL:
            move(job, &job.dresidual, &p.t, <stored *> dy, True)
        past_values(job, p)


cdef void short_dx(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef Unit u = unit_of(job, task.unit)
    cdef const double *slopes = known + slopes_at(job)
    cdef Short p = short_of(job, task.unit, task.chunk, known, slopes, scratch, like), wide
    cdef Py_ssize_t groups = p.a.groups, values = p.a.values, g
    cdef bint none = False
    for g in range(groups):
        none |= known[COUNT * groups + g] == 0
    if (lies_ready(job, &p, &job.x, _) and lies_ready(job, &p, &job.y, _) and lies_ready(job, &p, &job.dy,
                                                                                         _) and not job.y.streamed
            and job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL and not none
            and parameters_ready(job, &p) and (vec is doubles or all_comfortable(&p, groups, True))):
        dx_values(<const stored *> address(&job.x, p.t.n, p.t.c, p.t.s), <const stored *> address(&job.dy, p.t.n,
                                                                                                  p.t.c, p.t.s),
                  <stored *> address(&job.y, p.t.n, p.t.c, p.t.s), &p.a, like)
        return
    for g in range(groups):
        set_group(job, &p, g, 1, values)
        none = known[COUNT * groups + g] == 0
        if vec is doubles or (not none and comfortable(p.mean[g]) and 2.0 ** -40 < p.rstd[g] < 2.0 ** 40 and abs(p.slope[g]) < 2.0 ** 100):
            short_dx_tiles(job, &u, &p, values, known, scratch, _, like)
        else:
            wide = p
            widen_group(&wide, known, groups, g, slopes)
            short_dx_tiles(job, &u, &wide, values, known, scratch, <const double *> NULL, gn_all_doubles(0))
            p.i += values
            forward(job, &p.t, values)

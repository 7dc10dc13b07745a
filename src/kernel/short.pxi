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


cdef void *expand_view(const Job *job, const View *v, double absent, void *to, Py_ssize_t *step, Py_ssize_t *size) noexcept nogil:
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


cdef inline const void *widened(const void *p, Py_ssize_t n, double *tile) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        tile[i] = (<const float *> p)[i]
    return tile


cdef struct Short:  # a part of a group with short channels
    Span t
    Py_ssize_t i  # its first value in the sample
    Py_ssize_t left
    Values a
    const char *weights  # of the sample
    const char *biases


cdef inline Short short_of(const Job *job, const Unit *u, Py_ssize_t chunk, const double *known, Py_ssize_t g, vec like) noexcept nogil:
    cdef Short p
    cdef double mean = known[PIVOT * u.groups + g]
    cdef Part part = part_of(job, u, chunk, g)
    p.t = span_of(&part)
    p.left = p.t.lanes
    p.i = part.c * job.S + part.s
    p.weights = <const char *> job.weights + u.n * job.weight_step
    p.biases = <const char *> job.biases + u.n * job.bias_step
    p.a.mean = in_type(mean, like)
    p.a.rstd = rstd_of(job, known, u.groups, g)
    p.a.rest = (p.a.mean - mean) * p.a.rstd
    p.a.slope = p.a.constant = 0
    p.a.weight = p.a.bias = NULL
    return p


cdef inline bint next_values(const Job *job, Short *p, const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    """Set the span to the next SHORT_TILE values and point to their parameters, in the type that they are computed in."""
    if p.left == 0:
        return False
    p.t.lanes = min(p.left, SHORT_TILE)
    p.a.weight = p.weights + p.i * job.weight_size
    p.a.bias = p.biases + p.i * job.bias_size
    if vec is doubles and job.work != FLOAT64:
        p.a.weight = widened(p.a.weight, p.t.lanes, <double *> scratch.weight)
        p.a.bias = widened(p.a.bias, p.t.lanes, <double *> scratch.bias)
    return True


cdef inline void past_values(const Job *job, Short *p) noexcept nogil:
    p.left -= p.t.lanes
    p.i += p.t.lanes
    forward(job, &p.t, p.t.lanes)


cdef void short_affine_part(const Job *job, Short *p, const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    cdef const stored *x
    cdef const stored *residual = NULL
    cdef stored *y
    cdef Py_ssize_t row
    while next_values(job, p, scratch, _, like):
        x = load_tile(job, &job.x, &p.t, <stored *> scratch.x, &row)
        if job.residual.data != NULL:
            residual = load_tile(job, &job.residual, &p.t, <stored *> scratch.y, &row)
        y = direct(job, &job.y, &p.t, <stored *> scratch.y, &row)
        affine_values(x, residual, y, p.t.lanes, &p.a, job.activation, like)
        if y == <stored *> scratch.y:
            move(job, &job.y, &p.t, y, True)
        past_values(job, p)


cdef void short_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, const Scratch *scratch,
                       const stored *_, vec like) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef Short p
    cdef Py_ssize_t g
    for g in range(u.groups):
        p = short_of(job, &u, chunk, known, g, like)
        if vec is doubles or (comfortable(p.a.mean) and comfortable(p.a.rstd)):
            short_affine_part(job, &p, scratch, _, like)
        else:
            p = short_of(job, &u, chunk, known, g, gn_all_doubles(0))
            short_affine_part(job, &p, scratch, <const double *> NULL, gn_all_doubles(0))


# ---- the gradient, whose sums are taken in float64: with a parameter for each value there is little to be gained ------


cdef void short_gradient_tile(const Job *job, Short *p, const Scratch *scratch, const stored **x, const stored **dy, vec like) noexcept nogil:
    cdef const stored *residual = NULL
    cdef Py_ssize_t row
    x[0] = load_tile(job, &job.x, &p.t, <stored *> scratch.x, &row)
    if job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL:
        dy[0] = load_tile(job, &job.dy, &p.t, <stored *> scratch.dy, &row)
        return
    if job.activation != IDENTITY:
        if job.residual.data != NULL:
            residual = load_tile(job, &job.residual, &p.t, <stored *> scratch.y, &row)
        affine_values(x[0], residual, <stored *> scratch.y, p.t.lanes, &p.a, IDENTITY, like)
    gradient_tile(job, &p.t, scratch.y, scratch, x, dy, like)


cdef inline doubles weight_at(const void *weight, Py_ssize_t i, const stored *_) noexcept nogil:
    if stored is double:
        return gn_doubles_of_double(<const double *> weight + i)
    else:
        return gn_doubles_of_float(<const float *> weight + i)


cdef void add_short(const stored *x, const stored *dy, Py_ssize_t n, const Values *t, double mean, double *dbias, double *dweight,
                    double *sums) noexcept nogil:
    """Add each value's share of dbias and dweight, and in LANES lanes weight times these."""
    cdef doubles v, d, w, m = gn_all_doubles(mean), rstd = gn_all_doubles(t.rstd)
    cdef double weight
    cdef Py_ssize_t i = 0, j, k, r
    for r in range(n // LANES):
        for k in range(LANES // DOUBLES):
            v = load(dy + i, m)
            d = v * ((load(x + i, m) - m) * rstd)
            w = weight_at(t.weight, i, x)
            gn_add_doubles(dbias + i, v)
            gn_add_doubles(dweight + i, d)
            gn_add_doubles(sums + k * DOUBLES, w * v)
            gn_add_doubles(sums + LANES + k * DOUBLES, w * d)
            i += DOUBLES
    for j in range(n % LANES):
        weight = (<const double *> t.weight)[i] if stored is double else (<const float *> t.weight)[i]
        dbias[i] += scalar(dy[i])
        sums[j] += weight * scalar(dy[i])
        dweight[i] += scalar(dy[i]) * ((scalar(x[i]) - mean) * t.rstd)
        sums[LANES + j] += weight * (scalar(dy[i]) * ((scalar(x[i]) - mean) * t.rstd))
        i += 1


cdef void short_sums(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, const Scratch *scratch,
                     const stored *_, vec like) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef double lanes[2 * LANES]
    cdef double *each = scratch.channels
    cdef double *slopes = found + slopes_at(job)
    cdef double *dbias = job.dbias + u.n // job.block * job.C
    cdef double *dweight = job.dweight + u.n // job.block * job.C
    cdef const stored *x
    cdef const stored *dy
    cdef double a, b
    cdef Short p
    cdef Py_ssize_t g, i
    for g in range(u.groups):
        p = short_of(job, &u, chunk, known, g, like)
        memset(lanes, 0, sizeof(lanes))
        while next_values(job, &p, scratch, _, like):
            short_gradient_tile(job, &p, scratch, &x, &dy, like)
            if job.S == 1:
                add_short(x, dy, p.t.lanes, &p.a, known[PIVOT * u.groups + g], dbias + p.i, dweight + p.i, lanes)
            else:
                memset(each, 0, 2 * SHORT_TILE * sizeof(double))
                add_short(x, dy, p.t.lanes, &p.a, known[PIVOT * u.groups + g], each, each + SHORT_TILE, lanes)
                for i in range(p.t.lanes):
                    dbias[(p.i + i) // job.S] += each[i]
                    dweight[(p.i + i) // job.S] += each[SHORT_TILE + i]
            past_values(job, &p)
        gn_total(lanes, &a, &b)
        slopes[2 * g] += a
        slopes[2 * g + 1] += b


cdef void short_dx_part(const Job *job, const Unit *u, Short *p, bint none, const double *known, const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    cdef const stored *x
    cdef const stored *dy
    cdef stored *dx
    cdef Py_ssize_t row
    while next_values(job, p, scratch, _, like):
        short_gradient_tile(job, p, scratch, &x, &dy, like)
        dx = direct(job, &job.y, &p.t, <stored *> scratch.y, &row)
        dx_values(x, dy, dx, p.t.lanes, &p.a, like)
        if none or job.mask.data != NULL:
            unmoved(job, u, &p.t, dy, dx, known, scratch)
        if dx == <stored *> scratch.y:
            move(job, &job.y, &p.t, dx, True)
        if job.dresidual.data != NULL:
            move(job, &job.dresidual, &p.t, <stored *> dy, True)
        past_values(job, p)


cdef void short_dx(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, const Scratch *scratch,
                   const stored *_, vec like) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef const double *slopes = known + slopes_at(job)
    cdef double mean
    cdef Short p
    cdef Py_ssize_t g
    cdef bint none
    for g in range(u.groups):
        mean = known[PIVOT * u.groups + g]
        none = known[COUNT * u.groups + g] == 0
        p = short_of(job, &u, chunk, known, g, like)
        p.a.slope = p.a.rstd * p.a.rstd * slopes[2 * g + 1]
        p.a.constant = p.a.rstd * slopes[2 * g] - p.a.slope * (mean - p.a.mean)
        if vec is doubles or (not none and comfortable(p.a.mean) and 2.0 ** -40 < p.a.rstd < 2.0 ** 40 and abs(p.a.slope) < 2.0 ** 100):
            short_dx_part(job, &u, &p, none, known, scratch, _, like)
        else:
            p = short_of(job, &u, chunk, known, g, gn_all_doubles(0))
            p.a.slope = p.a.rstd * p.a.rstd * slopes[2 * g + 1]
            p.a.constant = p.a.rstd * slopes[2 * g]
            short_dx_part(job, &u, &p, none, known, scratch, <const double *> NULL, gn_all_doubles(0))

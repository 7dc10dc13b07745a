# The walk of arrays of two dimensions, whose channels have a single position: each scale and offset would be used once. It
# takes fewer steps to work in float64 from load to store than to round them first (docs/numerics.md has the times).


cdef inline void single_affine_as(const Job *job, const Span *t, const real *x, real *y, const Standard *z, value _) noexcept nogil:
    cdef value wbuffer[WIDTH]
    cdef value bbuffer[WIDTH]
    cdef const value *weight = of_channels[value](&job.weight, t.n, t.c, t.lanes, 1, wbuffer)
    cdef const value *bias = of_channels[value](&job.bias, t.n, t.c, t.lanes, 0, bbuffer)
    cdef double power = z.power, mean = z.mean + z.rest, factor = z.factor
    cdef Py_ssize_t i, k
    for k in range(t.lanes // LANES):
        i = k * LANES
        put_lanes(y + i, (lanes_at(x + i) * power - mean) * (lanes_at(weight + i) * factor) + lanes_at(bias + i))
    for i in range(t.lanes - t.lanes % LANES, t.lanes):
        y[i] = <real> ((x[i] * power - mean) * (weight[i] * factor) + bias[i])


cdef inline void single_affine_of(const Job *job, const Span *t, const real *x, real *y, const Standard *z) noexcept nogil:
    """(x - mean) * rstd * weight + bias of some channels of a group."""
    if real is double or job.weight.storage == FLOAT64 or job.bias.storage == FLOAT64:
        single_affine_as[real, double](job, t, x, y, z, 0)
    else:
        single_affine_as[real, float](job, t, x, y, z, 0)


cdef inline void single_activated(const Job *job, const Span *t, const real *x, real *ztile, real *rtile, real *y,
                                  const Standard *z, int activation) noexcept nogil:
    """act((x - mean) * rstd * weight + bias + residual); what follows the affine by the loops of the other walks, with one
    that changes nothing."""
    cdef real unchanged[PARAMETERS]
    cdef const real *residual
    cdef Flow flow
    cdef Py_ssize_t row, j
    if activation == IDENTITY and job.residual.data == NULL:
        single_affine_of[real](job, t, x, y, z)
        return
    residual = residual_of[real](job, t, rtile, &flow, &row)
    flow.stream = False
    flow.ahead = 0
    for j in range(t.lanes):
        unchanged[POWER + j] = unchanged[SCALE + j] = 1
        unchanged[CENTRE + j] = 0
        unchanged[OFFSET + j] = <real> -0.0
    single_affine_of[real](job, t, x, ztile, z)
    lanes_activated[real, real](ztile, 0, residual, 0, y, 0, 1, t.lanes, unchanged, activation, flow)


cdef void single_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, real _) noexcept nogil:
    cdef real xtile[WIDTH]
    cdef real ytile[WIDTH]
    cdef real ztile[WIDTH]
    cdef real rtile[WIDTH]
    cdef Py_ssize_t pos, stop, row
    cdef const real *x
    cdef real *y
    cdef Unit u = unit_of(job, unit)
    cdef Standard z
    cdef Span whole, t
    standardize[real](known, 1, 0, job.eps, &z, 0)
    bounds(job, chunk, &pos, &stop)
    whole = t = planar_span(job, &u, pos, stop - pos)
    while t.lanes > 0:
        t.lanes = min(t.lanes, WIDTH)
        x = load[real](job, &job.x, &t, xtile, &row)
        y = direct[real](job, &job.y, &t, ytile, False, &row)
        single_activated[real](job, &t, x, ztile, rtile, y, &z, job.activation)
        if y == ytile:
            move[real](job, &job.y, &t, y, True)
        advance(job, &whole, &t)


cdef inline void single_sums(const Job *job, const Span *t, const real *x, const real *dy, double mean, double rstd, double *slopes,
                             value _) noexcept nogil:
    """Add the shares of channels in dbias and dweight, and in M * a and M * b."""
    cdef value buffer[WIDTH]
    cdef double part[2 * QUARTER]
    cdef double *dbias = job.dbias + t.n // job.block * job.C + t.c
    cdef double *dweight = job.dweight + t.n // job.block * job.C + t.c
    cdef const value *weight = of_channels[value](&job.weight, t.n, t.c, t.lanes, 1, buffer)
    cdef Py_ssize_t r, i, j, k
    memset(part, 0, sizeof(part))
    for r in range(t.lanes // QUARTER):
        for k in range(QUARTER // LANES):
            j = k * LANES
            i = r * QUARTER + j
            settle_lanes(lanes_at(dy + i), lanes_at(dy + i) * (lanes_at(x + i) - mean) * rstd, lanes_at(weight + i),
                         dbias + i, dweight + i, part + j)
    for i in range(t.lanes - t.lanes % QUARTER, t.lanes):
        settle_channel(dy[i], dy[i] * (x[i] - mean) * rstd, weight[i], dbias + i, dweight + i, slopes)
    slopes[0] += total[double](part, QUARTER)
    slopes[1] += total[double](part + QUARTER, QUARTER)


cdef inline void single_dx(const Job *job, const Span *t, const real *x, const real *dy, real *y, double power, double mean,
                           double factor, double slope, double constant, value _) noexcept nogil:
    """dx = dy * rstd * weight - ((x * power - mean) * slope + constant)."""
    cdef value buffer[WIDTH]
    cdef const value *weight = of_channels[value](&job.weight, t.n, t.c, t.lanes, 1, buffer)
    cdef Py_ssize_t i, k
    for k in range(t.lanes // LANES):
        i = k * LANES
        put_lanes(y + i, (lanes_at(dy + i) * (lanes_at(weight + i) * factor) * power
                          - ((lanes_at(x + i) * power - mean) * slope + constant)))
    for i in range(t.lanes - t.lanes % LANES, t.lanes):
        y[i] = <real> (dy[i] * (weight[i] * factor) * power - ((x[i] * power - mean) * slope + constant))


cdef void single_gradient(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found,
                          bint summing, real _) noexcept nogil:
    """Of a chunk, the sums over its channels, or dx from them."""
    cdef real xtile[WIDTH]
    cdef real dytile[WIDTH]
    cdef real ytile[WIDTH]
    cdef real ztile[WIDTH]
    cdef real rtile[WIDTH]
    cdef real nothing[WIDTH]
    cdef uint8_t mtile[1]
    cdef Py_ssize_t pos, stop, row, j
    cdef double mean = 0, slope = 0, constant = 0
    cdef const real *x
    cdef const real *dy
    cdef real *y
    cdef Unit u = unit_of(job, unit)
    cdef Standard z
    cdef Span whole, t
    standardize[real](known, 1, 0, job.eps, &z, 0)
    bounds(job, chunk, &pos, &stop)
    whole = t = planar_span(job, &u, pos, stop - pos)
    if not summing and (job.mask.data == NULL or load_mask(job, t, 1, mtile)[0] != 0):
        slope = known[slopes_at(job)]
        constant = known[slopes_at(job) + 1] + slope * z.rest
    if slope != 0:
        mean = z.mean + z.rest
    elif not summing:  # where nothing counts there is no slope, not even of NaN
        memset(nothing, 0, min(WIDTH, t.lanes) * sizeof(real))
    while t.lanes > 0:
        t.lanes = min(t.lanes, WIDTH)
        x = load[real](job, &job.x, &t, xtile, &row)
        if job.activation != IDENTITY:
            single_activated[real](job, &t, x, ztile, rtile, ztile, &z, IDENTITY)
        dy = before_activation[real](job, &t, ztile, dytile, &row)
        if summing:
            if job.weight.storage == FLOAT32:
                single_sums[real, float](job, &t, x, dy, known[PIVOT], z.factor * z.power, found + slopes_at(job), 0)
            else:
                single_sums[real, double](job, &t, x, dy, known[PIVOT], z.factor * z.power, found + slopes_at(job), 0)
        else:
            y = direct[real](job, &job.y, &t, ytile, False, &row)
            if slope == 0:
                x = nothing
            if job.weight.storage == FLOAT32:
                single_dx[real, float](job, &t, x, dy, y, z.power, mean, z.factor, slope, constant, 0)
            else:
                single_dx[real, double](job, &t, x, dy, y, z.power, mean, z.factor, slope, constant, 0)
            if slope == 0 or slope - slope != 0 or constant - constant != 0:
                for j in range(t.lanes):
                    y[j] = one_nan[real](y[j])
            if y == ytile:
                move[real](job, &job.y, &t, y, True)
            if job.dresidual.data != NULL:
                move[real](job, &job.dresidual, &t, <real *> dy, True)
        advance(job, &whole, &t)

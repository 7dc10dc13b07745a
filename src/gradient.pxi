# The gradient of the affine. With dy' = dy * act'(z) and xhat = (x - mean) * rstd, over the M values of a group,
#
#     dbias = sum(dy')    dweight = sum(dy' * xhat)        of each channel, then over the samples
#     a = sum(weight * dy') / M    b = sum(weight * dy' * xhat) / M
#     dx = rstd * (weight * dy' - a - xhat * b)
#
# so one sweep sums dy' and dy' * (x - mean) by channel, and another writes dx. The walks, tiles and parameters are
# those of the affine; arrays of two dimensions have theirs in single.pxi. Derivation: docs/gradient.md.


cdef inline void product_row(const real *x, const real *dy, const double *mean, double *sum1, double *sum2) noexcept nogil:
    """Add dy and dy * (x - mean) to QUARTER lanes. In float64, where products of float32 are exact: a and b may cancel to much
    less than the terms of their sums."""
    cdef Py_ssize_t j, k
    for k in range(QUARTER // LANES):
        j = k * LANES
        put_lanes(sum1 + j, lanes_at(sum1 + j) + lanes_at(dy + j))
        put_lanes(sum2 + j, lanes_at(sum2 + j) + lanes_at(dy + j) * (lanes_at(x + j) - lanes_at(mean + j)))


cdef inline void product_step(const real *x, Py_ssize_t row, const real *dy, Py_ssize_t dyrow, const double *mean,
                              double *sum1, double *sum2) noexcept nogil:
    """The same of four rows."""
    cdef const real *x1 = x + row
    cdef const real *x2 = x1 + row
    cdef const real *x3 = x2 + row
    cdef const real *dy1 = dy + dyrow
    cdef const real *dy2 = dy1 + dyrow
    cdef const real *dy3 = dy2 + dyrow
    cdef lanes m, d0, d1, d2, d3
    cdef Py_ssize_t j, k
    for k in range(QUARTER // LANES):
        j = k * LANES
        m = lanes_at(mean + j)
        d0 = lanes_at(dy + j)
        d1 = lanes_at(dy1 + j)
        d2 = lanes_at(dy2 + j)
        d3 = lanes_at(dy3 + j)
        put_lanes(sum1 + j, lanes_at(sum1 + j) + ((d0 + d1) + (d2 + d3)))
        put_lanes(sum2 + j, lanes_at(sum2 + j) + ((d0 * (lanes_at(x + j) - m) + d1 * (lanes_at(x1 + j) - m))
                                          + (d2 * (lanes_at(x2 + j) - m) + d3 * (lanes_at(x3 + j) - m))))


cdef inline void accumulate_products(const real *x, const real *dy, Py_ssize_t n, double mean, double *sum1, double *sum2) noexcept nogil:
    """Add sum(dy) and sum(dy * (x - mean)) of values that lie in a row."""
    cdef double sums[2 * QUARTER]
    cdef double means[QUARTER]
    cdef double rest1 = 0, rest2 = 0
    cdef Py_ssize_t r, j
    memset(sums, 0, sizeof(sums))
    for j in range(QUARTER):
        means[j] = mean
    for r in range(n // SHORT):
        gn_prefetch(<const char *> (x + TILE), SHORT * sizeof(real))  # of two streams the hardware follows one too late
        gn_prefetch(<const char *> (dy + TILE), SHORT * sizeof(real))
        product_step[real](x, QUARTER, dy, QUARTER, means, sums, sums + QUARTER)
        x += SHORT
        dy += SHORT
    for r in range(n % SHORT // QUARTER):
        product_row[real](x, dy, means, sums, sums + QUARTER)
        x += QUARTER
        dy += QUARTER
    for j in range(n % QUARTER):
        rest1 += dy[j]
        rest2 += dy[j] * (x[j] - mean)
    sum1[0] += total[double](sums, QUARTER) + rest1
    sum2[0] += total[double](sums + QUARTER, QUARTER) + rest2


cdef inline void slope_of_dy(real scale, real power, real *first, real *second) noexcept nogil:
    """weight * rstd as one factor or, out of the middle of float32's range, as two."""
    first[0] = scale * power
    second[0] = 1
    if not <real> 1e-30 < max(first[0], -first[0]) < <real> 1e30:
        first[0] = scale
        second[0] = power


cdef inline real one_nan(real v) noexcept nogil:
    """v, and one NaN for all: of two NaNs in a sum or product the compiler chooses which one's sign is kept."""
    return v if v == v else <real> NAN


cdef inline void gradient_run(const real *x, const real *dy, real *y, Py_ssize_t n, real power, real centre, real first, real second,
                              real slope, real constant, bint stream) noexcept nogil:
    """dx = dy * first * second - ((x * power - centre) * slope + constant) on values of a channel, block by block."""
    cdef real z[SHORT]
    cdef real last[SHORT]
    cdef Py_ssize_t head = gn_before_line(y) // <Py_ssize_t> sizeof(real) if stream else 0, i, j, k
    cdef bint kept = n % SHORT and (x == y or dy == y)  # as in affine_blocks
    cdef real *spare = last
    if n < SHORT:
        for j in range(n):
            y[j] = dy[j] * first * second - ((x[j] * power - centre) * slope + constant)
        return
    if kept:
        memset(last, 0, sizeof(last))
    for i in range(first_block(n, head), (n - head) // SHORT):
        k = place_of_block(i, n, head)
        for j in range(SHORT):
            z[j] = dy[k + j] * first * second - ((x[k + j] * power - centre) * slope + constant)
        store_block[real, real](z, spare if kept and i < 0 else y + k, stream and i >= 0)
    if kept:
        memcpy(y + n - SHORT, last, sizeof(last))


cdef const real *before_activation(const Job *job, const Span *t, const real *z, real *tile, Py_ssize_t *row) noexcept nogil:
    """dy' = dy * act'(z): dy itself, or packed in a tile if there is an activation or it is wanted as dresidual."""
    cdef const real *dy = load[real](job, &job.dy, t, tile, row)
    if job.activation == IDENTITY and job.dresidual.data == NULL:
        return dy
    if job.activation == IDENTITY or row[0] != t.lanes:
        pack[real](dy, row[0], t, NULL, tile)
        row[0] = t.lanes
        dy = tile
    if job.activation != IDENTITY:
        activate_gradient[real](job.activation, z, dy, tile, t.rows * t.lanes)
    return tile


cdef void add_sums(const Job *job, Py_ssize_t unit, double *into, const double *other) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(sums_at(job), slopes_at(job) + 2 * job.unit_groups):
        into[i] += other[i]


cdef inline void settle_lanes(lanes s1, lanes s2, lanes weight, double *dbias, double *dweight, double *part) noexcept nogil:
    put_lanes(dbias, lanes_at(dbias) + s1)
    put_lanes(dweight, lanes_at(dweight) + s2)
    put_lanes(part, lanes_at(part) + weight * s1)
    put_lanes(part + QUARTER, lanes_at(part + QUARTER) + weight * s2)


cdef inline void settle_channel(double s1, double s2, double weight, double *dbias, double *dweight, double *slopes) noexcept nogil:
    dbias[0] += s1
    dweight[0] += s2
    slopes[0] += weight * s1
    slopes[1] += weight * s2


cdef inline void settle_channels_as(const Job *job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, const double *sum1,
                                    const double *sum2, double rstd, double *slopes, value _) noexcept nogil:
    cdef value buffer[WIDTH]
    cdef double part[2 * QUARTER]
    cdef double *dbias = job.dbias + n // job.block * job.C + c
    cdef double *dweight = job.dweight + n // job.block * job.C + c
    cdef const value *weight = of_channels[value](&job.weight, n, c, channels, 1, buffer)
    cdef Py_ssize_t r, i, j, k
    memset(part, 0, sizeof(part))
    for r in range(channels // QUARTER):
        for k in range(QUARTER // LANES):
            j = k * LANES
            i = r * QUARTER + j
            settle_lanes(lanes_at(sum1 + i), lanes_at(sum2 + i) * rstd, lanes_at(weight + i), dbias + i, dweight + i, part + j)
    for i in range(channels - channels % QUARTER, channels):
        settle_channel(sum1[i], sum2[i] * rstd, weight[i], dbias + i, dweight + i, slopes)
    slopes[0] += total[double](part, QUARTER)
    slopes[1] += total[double](part + QUARTER, QUARTER)


cdef void settle_channels(const Job *job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, const double *sum1,
                          const double *sum2, double rstd, double *slopes) noexcept nogil:
    """From the sums of up to WIDTH channels of a group: their shares of dbias and dweight, and of M * a and M * b."""
    if job.weight.storage == FLOAT32:
        settle_channels_as[float](job, n, c, channels, sum1, sum2, rstd, slopes, 0)
    else:
        settle_channels_as[double](job, n, c, channels, sum1, sum2, rstd, slopes, 0)


cdef void settle_sums(const Job *job, Py_ssize_t unit, double *scratch, real _) noexcept nogil:
    """From a unit's sums: its shares of dweight and dbias, and the slopes of dx = dy' * scale * power
    - ((x * power - mean) * slopes[0] + slopes[1])."""
    cdef double *sums = scratch + sums_at(job)
    cdef double *slopes = scratch + slopes_at(job)
    cdef double a, b, rstd, count
    cdef Py_ssize_t g, c, k
    cdef Unit u = unit_of(job, unit)
    cdef Standard z
    for g in range(u.groups):
        standardize[real](scratch, u.groups, g, job.eps, &z, 0)
        rstd = z.factor * z.power
        for k in range((job.K + WIDTH - 1) // WIDTH if job.S > 1 else 0):
            c = g * job.K + k * WIDTH
            settle_channels(job, u.n, u.c + c, min(WIDTH, job.K - k * WIDTH), sums + c, sums + u.channels + c, rstd, slopes)
        count = scratch[COUNT * u.groups + g]
        a = slopes[0] / count if count > 0 else 0
        b = slopes[1] / count if count > 0 else 0
        slopes[0] = rstd * b * z.factor
        slopes[1] = rstd * a - slopes[0] * z.rest
        slopes += 2


# ---- planar ----------------------------------------------------------------------------------------


cdef void planar_gradient(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found,
                          bint summing, real _) noexcept nogil:
    """Of a chunk, the sums of each channel, or dx from the sums."""
    cdef real xtile[TILE]
    cdef real dytile[TILE]
    cdef real ytile[TILE]
    cdef real ztile[TILE]
    cdef uint8_t mtile[TILE]
    cdef real rtile[TILE]
    cdef real affine[PARAMETERS]
    cdef real each_scale[WIDTH]
    cdef Py_ssize_t pos, stop, left, row, rrow, k, c, i, j, n
    cdef double *sums = NULL
    cdef double whole_mean = known[PIVOT]
    cdef real power, mean, slope = 0, constant = 0, a = 0, b = 1
    cdef bint sloped
    cdef const real *x
    cdef const real *dy
    cdef const uint8_t *mask
    cdef const real *residual
    cdef const real *scale = affine + SCALE
    cdef real *y
    cdef Flow flow
    cdef Unit u = unit_of(job, unit)
    cdef Window w
    cdef Standard z
    cdef Span whole, t
    cdef bint stream, plain
    flow.stream = False
    flow.ahead = 0
    standardize[real](known, 1, 0, job.eps, &z, 0)
    power = <real> z.power
    mean = <real> z.mean
    bounds(job, chunk, &pos, &stop)
    whole = t = planar_span(job, &u, pos, stop - pos)
    w.first = t.c - u.c
    w.count = 0
    if job.activation != IDENTITY:
        centre[real](min(WIDTH, u.channels), &z, affine)
    if summing:
        sums = found + sums_at(job)
        if job.activation == IDENTITY:
            w.count = u.channels  # no channel's scale and shift are asked for
    else:
        slope = <real> known[slopes_at(job)]
        constant = <real> known[slopes_at(job) + 1]
    sloped = job.mask.data == NULL and slope != 0 and slope - slope == 0 and constant - constant == 0
    plain = (sloped and not summing and job.y.streamed and job.activation == IDENTITY and job.dresidual.data == NULL
             and job.x.storage == storage_as(xtile) and job.dy.storage == storage_as(xtile)
             and job.y.data != job.x.data and job.y.data != job.dy.data)
    while t.lanes > 0:
        left = t.lanes
        c = next_tile[real](job, &u, left, &z, &t, &w, affine)
        stream = plain and in_one_piece(job, left, &t)
        k = t.c - u.c
        x = load[real](job, &job.x, &t, xtile, &row)
        if job.activation != IDENTITY:
            residual = residual_of[real](job, &t, rtile, &flow, &rrow)
            planar_tile[real, real](job, &t, x, residual, ztile, affine + c, IDENTITY, flow)
        dy = before_activation[real](job, &t, ztile, dytile, &row)
        if summing:
            i = 0
            while i < t.lanes:
                n = min(t.lanes - i, job.S - (t.s if i == 0 else 0))
                accumulate_products[real](x + i, dy + i, n, whole_mean, sums + k, sums + u.channels + k)
                i += n
                k += 1
        else:
            y = direct[real](job, &job.y, &t, ytile, stream, &row)
            if not sloped:
                for j in range(t.lanes):  # where nothing counts there is no slope, not even of NaN
                    ztile[j] = ((x[j] * power - mean) * slope if slope != 0 else <real> 0) + constant
            if job.mask.data != NULL:
                mask = load_mask(job, t, t.lanes, mtile)
                for j in range(t.lanes):
                    ztile[j] = ztile[j] if mask[j] != 0 else <real> 0
            if job.S < SHORT:
                repeat[real](scale + c, job.S - t.s, job.S, t.lanes, each_scale)
                if sloped:
                    for j in range(t.lanes):
                        slope_of_dy[real](each_scale[j], power, &a, &b)
                        y[j] = dy[j] * a * b - ((x[j] * power - mean) * slope + constant)
                else:
                    for j in range(t.lanes):
                        slope_of_dy[real](each_scale[j], power, &a, &b)
                        y[j] = one_nan[real](dy[j] * a * b - ztile[j])
            i = 0 if job.S >= SHORT else t.lanes
            while i < t.lanes:
                n = min(t.lanes, i + job.S - (t.s if i == 0 else 0))
                slope_of_dy[real](scale[c], power, &a, &b)
                if sloped:
                    gradient_run[real](x + i, dy + i, y + i, n - i, power, mean, a, b, slope, constant, stream)
                else:
                    for j in range(i, n):
                        y[j] = one_nan[real](dy[j] * a * b - ztile[j])
                i = n
                c += 1
            if y == ytile:
                move[real](job, &job.y, &t, y, True)
            if job.dresidual.data != NULL:
                move[real](job, &job.dresidual, &t, <real *> dy, True)
        advance(job, &whole, &t)


# ---- interleaved -----------------------------------------------------------------------------------


cdef inline void accumulate_product_rows(const real *x, Py_ssize_t row, const real *dy, Py_ssize_t dyrow, Py_ssize_t rows,
                                         Py_ssize_t lanes, const double *mean, double *s1, double *s2) noexcept nogil:
    """s1 += sum(dy), s2 += sum(dy * (x - mean)) down each lane."""
    cdef Py_ssize_t whole = lanes - lanes % QUARTER, r, i, j
    for r in range(rows // 4):
        for i in range(lanes // QUARTER):
            j = i * QUARTER
            if row == lanes and dyrow == lanes:
                gn_prefetch(<const char *> (x + AHEAD + 4 * j), SHORT * sizeof(real))
                gn_prefetch(<const char *> (dy + AHEAD + 4 * j), SHORT * sizeof(real))
            product_step[real](x + j, row, dy + j, dyrow, mean + j, s1 + j, s2 + j)
        for j in range(whole, lanes):
            s1[j] += ((<double> dy[j] + <double> dy[dyrow + j]) + (<double> dy[2 * dyrow + j] + <double> dy[3 * dyrow + j]))
            s2[j] += ((dy[j] * (x[j] - mean[j]) + dy[dyrow + j] * (x[row + j] - mean[j]))
                      + (dy[2 * dyrow + j] * (x[2 * row + j] - mean[j]) + dy[3 * dyrow + j] * (x[3 * row + j] - mean[j])))
        x += 4 * row
        dy += 4 * dyrow
    for r in range(rows % 4):
        for j in range(lanes):
            s1[j] += dy[j]
            s2[j] += dy[j] * (x[j] - mean[j])
        x += row
        dy += dyrow


cdef void interleaved_gradient(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found,
                               bint summing, real _) noexcept nogil:
    """Of a chunk, the sums of each channel, or dx from the sums."""
    cdef real xtile[AREA]
    cdef real dytile[AREA]
    cdef real ytile[AREA]
    cdef real ztile[AREA]
    cdef real rtile[AREA]
    cdef uint8_t mtile[POSITIONS]
    cdef real affine[PARAMETERS]
    cdef const real *power = affine + POWER
    cdef const real *mean = affine + CENTRE
    cdef const real *scale = affine + SCALE
    cdef real first[WIDTH]
    cdef real second[WIDTH]
    cdef real slope[WIDTH]
    cdef real constant[WIDTH]
    cdef double means[WIDTH]
    cdef double s1[WIDTH]
    cdef double s2[WIDTH]
    cdef Py_ssize_t stop = min((chunk + 1) * job.chunk, job.S), fold, row, dyrow, rrow, yrow, r, j, k, g
    cdef bint sloped
    cdef double *sums = NULL
    cdef const double *slopes = known + slopes_at(job)
    cdef const real *x
    cdef const real *dy
    cdef const real *residual
    cdef const uint8_t *mask
    cdef real *y
    cdef Flow flow
    cdef Unit u = unit_of(job, unit)
    cdef Span t
    flow.stream = False
    flow.ahead = 0
    t.n = u.n
    t.c = u.c
    t.planar = False
    while t.c < u.c + u.channels:
        t.lanes = strip(job, t.c, u.c + u.channels)
        k = t.c - u.c
        if not summing or job.activation != IDENTITY:
            lane_parameters[real](job, &u, t.c, t.lanes, known, affine)
        sloped = not summing
        for j in range(widest(t.lanes)):
            g = (t.c + j % t.lanes) // job.K - u.first
            means[j] = known[PIVOT * u.groups + g]
            if not summing:
                slope_of_dy[real](scale[j], power[j], &first[j], &second[j])
                slope[j] = <real> slopes[2 * g]
                constant[j] = <real> slopes[2 * g + 1]
                sloped &= slope[j] != 0 and slope[j] - slope[j] == 0 and constant[j] - constant[j] == 0
        t.s = chunk * job.chunk
        while t.s < stop:
            t.rows = next_rows(stop - t.s, t.lanes, AREA if summing else PATCH, &fold)
            x = load[real](job, &job.x, &t, xtile, &row)
            if job.activation != IDENTITY:
                x = in_a_row[real](x, &row, &t, xtile)
                residual = residual_of[real](job, &t, rtile, &flow, &rrow)
                if row != t.lanes or rrow != t.lanes:
                    fold = 1
                lanes_activated[real, real](x, fold * row, residual, fold * rrow, ztile, fold * t.lanes, t.rows // fold,
                                            fold * t.lanes, affine, IDENTITY, flow)
            dy = before_activation[real](job, &t, ztile, dytile, &dyrow)
            if summing:
                sums = found + sums_at(job)
                if fold > 1 and (row != t.lanes or dyrow != t.lanes):
                    pack[real](x, row, &t, NULL, xtile)
                    pack[real](dy, dyrow, &t, NULL, dytile)
                    x = xtile
                    dy = dytile
                    row = dyrow = t.lanes
                for j in range(fold * t.lanes):
                    s1[j] = 0
                    s2[j] = 0
                accumulate_product_rows[real](x, fold * row, dy, fold * dyrow, t.rows // fold, fold * t.lanes, means, s1, s2)
                for r in range(fold):
                    for j in range(t.lanes):
                        sums[k + j] += s1[r * t.lanes + j]
                        sums[u.channels + k + j] += s2[r * t.lanes + j]
            else:
                y = direct[real](job, &job.y, &t, ytile, False, &yrow)
                if job.mask.data == NULL and sloped:
                    for r in range(t.rows):
                        for j in range(t.lanes):
                            y[r * yrow + j] = (dy[r * dyrow + j] * first[j] * second[j]
                                               - ((x[r * row + j] * power[j] - mean[j]) * slope[j] + constant[j]))
                else:
                    for r in range(t.rows):
                        for j in range(t.lanes):
                            ztile[r * t.lanes + j] = ((x[r * row + j] * power[j] - mean[j]) * slope[j] if slope[j] != 0
                                                      else <real> 0) + constant[j]
                    if job.mask.data != NULL:
                        mask = load_mask(job, t, t.rows, mtile)
                        for r in range(t.rows):
                            if mask[r] == 0:
                                memset(ztile + r * t.lanes, 0, t.lanes * sizeof(real))
                    for r in range(t.rows):
                        for j in range(t.lanes):
                            y[r * yrow + j] = one_nan[real](dy[r * dyrow + j] * first[j] * second[j] - ztile[r * t.lanes + j])
                if y == ytile:
                    move[real](job, &job.y, &t, y, True)
                if job.dresidual.data != NULL:
                    move[real](job, &job.dresidual, &t, <real *> dy, True)
            t.s += t.rows
        t.c += t.lanes

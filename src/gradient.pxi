# The gradient of the affine. With dy' = dy * act'(z) and xhat = (x - mean) * rstd, over the M values of a group,
#
#     dbias = sum(dy')    dweight = sum(dy' * xhat)        of each channel, then over the samples
#     a = sum(weight * dy') / M    b = sum(weight * dy' * xhat) / M
#     dx = rstd * (weight * dy' - a - xhat * b)
#
# so one sweep sums dy' and dy' * (x - mean) by channel, and another writes dx. The walks, tiles and parameters are
# those of the affine. Derivation: docs/gradient.md.


cdef inline void product_step(const real *x, const real *dy, double mean, double *sums) noexcept nogil:
    """Four values to a lane, of SHORT in a row."""
    cdef Py_ssize_t j
    for j in range(QUARTER):
        sums[j] += ((<double> dy[j] + <double> dy[j + QUARTER])
                    + (<double> dy[j + 2 * QUARTER] + <double> dy[j + 3 * QUARTER]))
        sums[QUARTER + j] += ((dy[j] * (x[j] - mean) + dy[j + QUARTER] * (x[j + QUARTER] - mean))
                              + (dy[j + 2 * QUARTER] * (x[j + 2 * QUARTER] - mean)
                                 + dy[j + 3 * QUARTER] * (x[j + 3 * QUARTER] - mean)))


cdef inline void accumulate_products(const real *x, const real *dy, Py_ssize_t n, double mean, double *sum1, double *sum2) noexcept nogil:
    """Add sum(dy) and sum(dy * (x - mean)) of values that lie in a row. In float64, where products of float32 are exact:
    a and b may cancel to much less than the terms of their sums."""
    cdef double sums[2 * QUARTER]
    cdef real xrest[SHORT]
    cdef real dyrest[SHORT]
    cdef Py_ssize_t r, j, rest = n % SHORT
    memset(sums, 0, sizeof(sums))
    for r in range(n // SHORT):
        gn_prefetch(<const char *> (x + TILE), SHORT * sizeof(real))  # of two streams the hardware follows one too late
        gn_prefetch(<const char *> (dy + TILE), SHORT * sizeof(real))
        product_step[real](x, dy, mean, sums)
        x += SHORT
        dy += SHORT
    if rest:
        for j in range(SHORT):
            xrest[j] = x[j] if j < rest else <real> 0
            dyrest[j] = dy[j] if j < rest else <real> 0
        product_step[real](xrest, dyrest, mean, sums)
    sum1[0] += total[double](sums, QUARTER)
    sum2[0] += total[double](sums + QUARTER, QUARTER)


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
    """dy' = dy * act'(z); packed if it is wanted as dresidual."""
    cdef const real *dy = load[real](job, &job.dy, t, tile, row)
    if job.activation == IDENTITY and job.dresidual.data == NULL:
        return dy
    pack[real](dy, row[0], t, NULL, tile)
    row[0] = t.lanes
    if job.activation != IDENTITY:
        activate_gradient[real](job.activation, z, tile, t.rows * t.lanes)
    return tile


cdef void add_sums(const Job *job, Py_ssize_t unit, double *into, const double *other) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(sums_at(job), slopes_at(job)):
        into[i] += other[i]


cdef inline double dot(const double *v, const double *w, Py_ssize_t n) noexcept nogil:
    cdef double part[SHORT]
    cdef Py_ssize_t r, j
    for j in range(SHORT):
        part[j] = 0
    for r in range(n // SHORT):
        for j in range(SHORT):
            part[j] += v[j] * w[j]
        v += SHORT
        w += SHORT
    for j in range(n % SHORT):
        part[j] += v[j] * w[j]
    return total[double](part, SHORT)


cdef void settle_sums(const Job *job, Py_ssize_t unit, double *scratch, real _) noexcept nogil:
    """From a unit's sums: its share of dweight and dbias, and the slopes of dx = dy' * scale * power
    - ((x * power - mean) * slopes[0] + slopes[1])."""
    cdef double weight[WIDTH]
    cdef double product[WIDTH]
    cdef double *sums = scratch + sums_at(job)
    cdef double *slopes = scratch + slopes_at(job)
    cdef double *dbias
    cdef double *dweight
    cdef const double *w
    cdef double a, b, rstd
    cdef Py_ssize_t g, c, i, k, channels
    cdef Unit u = unit_of(job, unit)
    cdef Standard z
    for g in range(u.groups):
        standardize[real](scratch, u.groups, g, job.eps, &z, 0)
        rstd = z.factor * z.power
        a = b = 0
        for k in range((job.K + WIDTH - 1) // WIDTH):
            c = g * job.K + k * WIDTH
            channels = min(WIDTH, job.K - k * WIDTH)
            w = of_channels[double](&job.weight, u.n, u.c + c, channels, 1, weight)
            dbias = job.dbias + u.n // job.block * job.C + u.c + c
            dweight = job.dweight + u.n // job.block * job.C + u.c + c
            for i in range(channels):  # one array in a loop: with more GCC has too many overlaps to rule out
                product[i] = rstd * sums[u.channels + c + i]
            for i in range(channels):
                dbias[i] += sums[c + i]
            for i in range(channels):
                dweight[i] += product[i]
            a += dot(w, sums + c, channels)
            b += dot(w, product, channels)
        if scratch[COUNT * u.groups + g] > 0:
            a /= scratch[COUNT * u.groups + g]
            b /= scratch[COUNT * u.groups + g]
        else:
            a = b = 0
        slopes[2 * g] = rstd * b * z.factor
        slopes[2 * g + 1] = rstd * a - slopes[2 * g] * z.rest


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
    cdef const real *each
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
        if summing and job.S == 1:
            for j in range(t.lanes):
                sums[k + j] += dy[j]
            for j in range(t.lanes):
                sums[u.channels + k + j] += dy[j] * (x[j] - whole_mean)
        elif summing:
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
                each = scale + c
                if job.S > 1:
                    repeat[real](scale + c, job.S - t.s, job.S, t.lanes, each_scale)
                    each = each_scale
                if sloped:
                    for j in range(t.lanes):
                        ztile[j] = (x[j] * power - mean) * slope + constant
                for j in range(t.lanes):
                    slope_of_dy[real](each[j], power, &a, &b)
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


cdef inline void accumulate_product_lanes(const real *x, Py_ssize_t row, const real *dy, Py_ssize_t dyrow, Py_ssize_t lanes,
                                          const double *mean, double *s1, double *s2) noexcept nogil:
    """Four rows of up to VECTOR lanes at once."""
    cdef double t1[VECTOR]
    cdef double t2[VECTOR]
    cdef Py_ssize_t j
    for j in range(lanes):
        t1[j] = s1[j] + ((<double> dy[j] + <double> dy[dyrow + j])
                         + (<double> dy[2 * dyrow + j] + <double> dy[3 * dyrow + j]))
        t2[j] = s2[j] + ((dy[j] * (x[j] - mean[j]) + dy[dyrow + j] * (x[row + j] - mean[j]))
                         + (dy[2 * dyrow + j] * (x[2 * row + j] - mean[j]) + dy[3 * dyrow + j] * (x[3 * row + j] - mean[j])))
    memcpy(s1, t1, lanes * sizeof(double))
    memcpy(s2, t2, lanes * sizeof(double))


cdef inline void accumulate_product_rows(const real *x, Py_ssize_t row, const real *dy, Py_ssize_t dyrow, Py_ssize_t rows,
                                         Py_ssize_t lanes, const double *mean, double *s1, double *s2) noexcept nogil:
    """s1 += sum(dy), s2 += sum(dy * (x - mean)) down each lane."""
    cdef Py_ssize_t whole = lanes - lanes % VECTOR, r, i, j
    for r in range(rows // 4):
        for i in range(lanes // VECTOR):
            j = i * VECTOR
            if row == lanes and dyrow == lanes:
                gn_prefetch(<const char *> (x + AHEAD + 4 * j), 4 * VECTOR * sizeof(real))
                gn_prefetch(<const char *> (dy + AHEAD + 4 * j), 4 * VECTOR * sizeof(real))
            accumulate_product_lanes[real](x + j, row, dy + j, dyrow, VECTOR, mean + j, s1 + j, s2 + j)
        if whole < lanes:
            accumulate_product_lanes[real](x + whole, row, dy + whole, dyrow, lanes - whole, mean + whole, s1 + whole, s2 + whole)
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

# The gradient of the affine. With dy' = dy * act'(z) and xhat = (x - mean) * rstd, over the M values of a group,
#
#     dbias = sum(dy')    dweight = sum(dy' * xhat)        of each channel, then over the samples
#     a = sum(weight * dy') / M    b = sum(weight * dy' * xhat) / M
#     dx = rstd * (weight * dy' - a - xhat * b)
#
# so one sweep sums dy' and dy' * (x - mean) by channel, and another writes dx. The walks, tiles and parameters are
# those of the affine. Derivation: docs/gradient.md.


cdef inline void accumulate_products(const real *x, Py_ssize_t row, const real *dy, Py_ssize_t dyrow, Py_ssize_t rows,
                                     Py_ssize_t lanes, const double *mean, double *s1, double *s2) noexcept nogil:
    """s1 += sum(dy), s2 += sum(dy * (x - mean)) down each lane, four rows at a time. In float64, where products of
    float32 are exact: a and b may cancel to much less than the terms of their sums."""
    cdef Py_ssize_t r, j
    cdef const real *x0
    cdef const real *x1
    cdef const real *x2
    cdef const real *x3
    cdef const real *dy0
    cdef const real *dy1
    cdef const real *dy2
    cdef const real *dy3
    for r in range(0, rows - 3, 4):
        x0 = x + r * row
        x1 = x0 + row
        x2 = x1 + row
        x3 = x2 + row
        dy0 = dy + r * dyrow
        dy1 = dy0 + dyrow
        dy2 = dy1 + dyrow
        dy3 = dy2 + dyrow
        for j in range(lanes):
            s1[j] += (<double> dy0[j] + <double> dy1[j]) + (<double> dy2[j] + <double> dy3[j])
            s2[j] += ((dy0[j] * (x0[j] - mean[j]) + dy1[j] * (x1[j] - mean[j]))
                      + (dy2[j] * (x2[j] - mean[j]) + dy3[j] * (x3[j] - mean[j])))
    for r in range(rows & ~3, rows):
        x0 = x + r * row
        dy0 = dy + r * dyrow
        for j in range(lanes):
            s1[j] += dy0[j]
            s2[j] += dy0[j] * (x0[j] - mean[j])


cdef inline void slope_of_dy(real scale, real power, real *first, real *second) noexcept nogil:
    """weight * rstd as one factor or, out of the middle of float32's range, as two."""
    first[0] = scale * power
    second[0] = 1
    if not <real> 1e-30 < max(first[0], -first[0]) < <real> 1e30:
        first[0] = scale
        second[0] = power


cdef inline void pack(const real *x, Py_ssize_t row, const Span *t, real *tile) noexcept nogil:
    cdef Py_ssize_t r, j
    if x != tile:
        for r in range(t.rows):
            for j in range(t.lanes):
                tile[r * t.lanes + j] = x[r * row + j]


cdef const real *before_activation(const Job *job, const Span *t, real *z, real *tile, Py_ssize_t *row) noexcept nogil:
    """dy' = dy * act'(z), from the affine z without its residual; packed if it is wanted as dresidual."""
    cdef const real *dy = load[real](job, &job.dy, t, tile, row)
    if job.activation == IDENTITY and job.dresidual.data == NULL:
        return dy
    pack[real](dy, row[0], t, tile)
    row[0] = t.lanes
    if job.activation != IDENTITY:
        add_residual[real](job, t, z, t.lanes)
        activate_gradient[real](job.activation, z, tile, t.rows * t.lanes)
    return tile


cdef void add_sums(const Job *job, Py_ssize_t unit, double *into, const double *other) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(sums_at(job), slopes_at(job)):
        into[i] += other[i]


cdef void settle_sums(const Job *job, Py_ssize_t unit, double *scratch, real _) noexcept nogil:
    """From a unit's sums: its share of dweight and dbias, and the slopes of dx = dy' * scale * power
    - ((x * power - mean) * slopes[0] + slopes[1])."""
    cdef double weight[WIDTH]
    cdef const double *w = weight
    cdef double *sums = scratch + sums_at(job)
    cdef double *slopes = scratch + slopes_at(job)
    cdef double a, b, product, rstd
    cdef Py_ssize_t g, c, i, j, channels
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t row = u.n // job.block * job.C
    cdef Standard z
    for g in range(u.groups):
        standardize[real](scratch, u.groups, g, job.eps, &z, 0)
        rstd = z.factor * z.power
        a = b = 0
        for c in range(g * job.K, (g + 1) * job.K):
            i = (c - g * job.K) % WIDTH
            if i == 0:
                channels = min(WIDTH, (g + 1) * job.K - c)
                w = of_channels[double](&job.weight, u.n, u.c + c, channels, 1, weight)
            product = rstd * sums[u.channels + c]
            a += w[i] * sums[c]
            b += w[i] * product
            j = row + u.c + c
            job.dbias[j] += sums[c]
            job.dweight[j] += product
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
    cdef real scale[WIDTH]
    cdef real shift[WIDTH]
    cdef double means[WIDTH]
    cdef double s1[WIDTH]
    cdef double s2[WIDTH]
    cdef Py_ssize_t pos, stop, row, k, i, j, run, lanes, rows
    cdef double *sums = NULL
    cdef real power, mean, slope = 0, constant = 0, a = 0, b = 1
    cdef const real *x
    cdef const real *dy
    cdef const real *mask
    cdef real *y
    cdef Unit u = unit_of(job, unit)
    cdef Window w
    cdef Standard z
    cdef Span t
    w.first = w.count = 0
    standardize[real](known, 1, 0, job.eps, &z, 0)
    power = <real> z.power
    mean = <real> z.mean
    if summing:
        sums = found + sums_at(job)
        for j in range(WIDTH if job.S == 1 else LANES):
            means[j] = known[PIVOT]
    else:
        slope = <real> known[slopes_at(job)]
        constant = <real> known[slopes_at(job) + 1]
    bounds(job, chunk, &pos, &stop)
    while pos < stop:
        next_tile[real](job, &u, pos, stop, &z, &t, &w, scale, shift)
        k = t.c - u.c
        x = load[real](job, &job.x, &t, xtile, &row)
        if job.activation != IDENTITY:
            planar_tile[real](job, &t, x, ztile, power, mean, scale + (k - w.first), shift + (k - w.first))
        dy = before_activation[real](job, &t, ztile, dytile, &row)
        if summing and job.S == 1:
            for j in range(t.lanes):
                s1[j] = 0
                s2[j] = 0
            accumulate_products[real](x, 0, dy, 0, 1, t.lanes, means, s1, s2)
            for j in range(t.lanes):
                sums[k + j] += s1[j]
                sums[u.channels + k + j] += s2[j]
        elif summing:
            i = 0
            while i < t.lanes:
                run = min(t.lanes - i, job.S - (t.s if i == 0 else 0))
                lanes = LANES if run >= 4 * LANES else LANES // 4
                rows = run // lanes
                for j in range(lanes):
                    s1[j] = 0
                    s2[j] = 0
                accumulate_products[real](x + i, lanes, dy + i, lanes, rows, lanes, means, s1, s2)
                rows = i + rows * lanes
                accumulate_products[real](x + rows, 0, dy + rows, 0, 1, i + run - rows, means, s1, s2)
                sums[k] += total[double](s1, lanes)
                sums[u.channels + k] += total[double](s2, lanes)
                i += run
                k += 1
        else:
            y = direct[real](job, &job.y, &t, ytile, &row)
            for j in range(t.lanes):  # where nothing counts there is no slope, not even of NaN
                ztile[j] = ((x[j] * power - mean) * slope if slope != 0 else <real> 0) + constant
            if job.mask.data != NULL:
                mask = load[real](job, &job.mask, &t, xtile, &row)
                for j in range(t.lanes):
                    ztile[j] = ztile[j] if mask[j] != 0 else <real> 0
            i = 0
            while i < t.lanes:
                run = min(t.lanes, i + job.S - (t.s if i == 0 else 0))
                slope_of_dy[real](scale[k - w.first], power, &a, &b)
                for j in range(i, run):
                    y[j] = dy[j] * a * b - ztile[j]
                i = run
                k += 1
            if y == ytile:
                move[real](job, &job.y, &t, y, True)
            if job.dresidual.data != NULL:
                move[real](job, &job.dresidual, &t, <real *> dy, True)
        pos += t.lanes


# ---- interleaved -----------------------------------------------------------------------------------


cdef void interleaved_gradient(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found,
                               bint summing, real _) noexcept nogil:
    """Of a chunk, the sums of each channel, or dx from the sums."""
    cdef real xtile[AREA]
    cdef real dytile[AREA]
    cdef real ytile[AREA]
    cdef real ztile[AREA]
    cdef real power[WIDTH]
    cdef real mean[WIDTH]
    cdef real scale[WIDTH]
    cdef real shift[WIDTH]
    cdef real first[WIDTH]
    cdef real second[WIDTH]
    cdef real slope[WIDTH]
    cdef real constant[WIDTH]
    cdef double means[WIDTH]
    cdef double s1[WIDTH]
    cdef double s2[WIDTH]
    cdef Py_ssize_t stop = min((chunk + 1) * job.chunk, job.S), fold, row, dyrow, yrow, r, i, j, k, g
    cdef double *sums = NULL
    cdef const double *slopes = known + slopes_at(job)
    cdef const real *x
    cdef const real *dy
    cdef const real *mask
    cdef real *y
    cdef Unit u = unit_of(job, unit)
    cdef Span t
    t.n = u.n
    t.c = u.c
    t.planar = False
    while t.c < u.c + u.channels:
        t.lanes = strip(job, t.c, u.c + u.channels)
        k = t.c - u.c
        lane_parameters[real](job, &u, t.c, t.lanes, known, power, mean, scale, shift)
        for j in range(widest(t.lanes)):
            g = (t.c + j % t.lanes) // job.K - u.first
            means[j] = known[PIVOT * u.groups + g]
            if not summing:
                slope_of_dy[real](scale[j], power[j], &first[j], &second[j])
                slope[j] = <real> slopes[2 * g]
                constant[j] = <real> slopes[2 * g + 1]
        t.s = chunk * job.chunk
        while t.s < stop:
            t.rows = next_rows(stop - t.s, t.lanes, &fold)
            x = load[real](job, &job.x, &t, xtile, &row)
            if job.activation != IDENTITY:
                interleaved_tile[real](x, row, ztile, t.lanes, t.rows, t.lanes, power, mean, scale, shift)
            dy = before_activation[real](job, &t, ztile, dytile, &dyrow)
            if summing:
                sums = found + sums_at(job)
                if fold > 1 and (row != t.lanes or dyrow != t.lanes):
                    pack[real](x, row, &t, xtile)
                    pack[real](dy, dyrow, &t, dytile)
                    x = xtile
                    dy = dytile
                    row = dyrow = t.lanes
                for j in range(fold * t.lanes):
                    s1[j] = 0
                    s2[j] = 0
                accumulate_products[real](x, fold * row, dy, fold * dyrow, t.rows // fold, fold * t.lanes, means, s1, s2)
                for r in range(fold):
                    for j in range(t.lanes):
                        sums[k + j] += s1[r * t.lanes + j]
                        sums[u.channels + k + j] += s2[r * t.lanes + j]
            else:
                y = direct[real](job, &job.y, &t, ytile, &yrow)
                for r in range(t.rows):
                    for j in range(t.lanes):
                        ztile[r * t.lanes + j] = ((x[r * row + j] * power[j] - mean[j]) * slope[j] if slope[j] != 0
                                                  else <real> 0) + constant[j]
                if job.mask.data != NULL:
                    mask = load[real](job, &job.mask, &t, xtile, &i)
                    for j in range(t.rows * t.lanes):
                        ztile[j] = ztile[j] if mask[j] != 0 else <real> 0
                for r in range(t.rows):
                    for j in range(t.lanes):
                        y[r * yrow + j] = dy[r * dyrow + j] * first[j] * second[j] - ztile[r * t.lanes + j]
                if y == ytile:
                    move[real](job, &job.y, &t, y, True)
                if job.dresidual.data != NULL:
                    move[real](job, &job.dresidual, &t, <real *> dy, True)
            t.s += t.rows
        t.c += t.lanes

# The walk of channels-last arrays, position by position: each lane is a channel (or a channel of one of several
# positions that share a row), and lanes are merged into groups at the end of a chunk. The arithmetic is that of
# moments.pxi and affine.pxi.


cdef inline Py_ssize_t strip(const Job *job, Py_ssize_t c, Py_ssize_t stop) noexcept nogil:
    """How many channels from c on share an interleaved tile: whole groups, or a part of one wide group."""
    if job.K > WIDTH:
        return min(WIDTH, job.K - c % job.K)
    return min(WIDTH // job.K * job.K, stop - c)


cdef inline Py_ssize_t widest(Py_ssize_t width) noexcept nogil:
    """The lanes of a row that holds several positions if there are few channels, so that the lanes are used."""
    return max(1, WIDTH // 4 // width) * width


cdef inline Py_ssize_t next_rows(Py_ssize_t left, Py_ssize_t width, Py_ssize_t area, Py_ssize_t *fold) noexcept nogil:
    """How many of the positions left make the next tile of about `area` values, `fold` of them to a row: whole rows, or
    what is left of one."""
    fold[0] = min(widest(width) // width, left)
    return min(min(ROWS, area // (fold[0] * width) & ~3), left // fold[0]) * fold[0]


cdef inline void accumulate_lanes(const real *x, Py_ssize_t row, Py_ssize_t lanes, const real *p, real *s1, real *s2) noexcept nogil:
    """Four rows of up to SHORT lanes at once, for fewer roundings in a chain and less traffic of the sums."""
    cdef real t1[SHORT]
    cdef real t2[SHORT]
    cdef const real *x1 = x + row
    cdef const real *x2 = x1 + row
    cdef const real *x3 = x2 + row
    cdef real d0, d1, d2, d3
    cdef Py_ssize_t j
    for j in range(lanes):
        d0 = x[j] - p[j]
        d1 = x1[j] - p[j]
        d2 = x2[j] - p[j]
        d3 = x3[j] - p[j]
        t1[j] = s1[j] + ((d0 + d1) + (d2 + d3))
        t2[j] = s2[j] + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
    for j in range(lanes):
        s1[j] = t1[j]
    for j in range(lanes):
        s2[j] = t2[j]


cdef inline void accumulate_rows(const real *x, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t lanes,
                                 const real *p, real *s1, real *s2) noexcept nogil:
    """s1 += sum(x - p), s2 += sum((x - p)^2) down each lane."""
    cdef Py_ssize_t whole = lanes - lanes % SHORT, r, i, j
    cdef real d
    for r in range(rows // 4):
        for i in range(lanes // SHORT):
            j = i * SHORT
            if row == lanes:  # four rows at once are out of the order of memory: ask for what comes in that order
                gn_prefetch(<const char *> (x + AHEAD + 4 * j), 4 * SHORT * sizeof(real))
            accumulate_lanes[real](x + j, row, SHORT, p + j, s1 + j, s2 + j)
        if whole < lanes:
            accumulate_lanes[real](x + whole, row, lanes - whole, p + whole, s1 + whole, s2 + whole)
        x += 4 * row
    for r in range(rows % 4):
        for j in range(lanes):
            d = x[j] - p[j]
            s1[j] += d
            s2[j] += d * d
        x += row


cdef void interleaved_pivots(const real *x, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t lanes, bint seen,
                             real *p, real *size) noexcept nogil:
    """A pivot for each lane: its mean in the block before or, at first, that of some rows."""
    cdef Py_ssize_t j
    if seen:
        for j in range(lanes):
            size[j] = max(size[j], abs(p[j]))
    else:
        lane_means[real](x, row, min(rows, PIVOT_ROWS), lanes, p, size)
    for j in range(lanes):
        p[j] = on_grid[real](p[j], size[j])


cdef void interleaved_sums(const real *x, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t lanes, const real *p, bint few,
                           real *copy, double *sum1, double *sum2) noexcept nogil:
    """Add sum(x - p) and sum((x - p)^2) of each lane to those of its block. Where few values count they are summed in
    float64 from the start."""
    cdef real s1[WIDTH]
    cdef real s2[WIDTH]
    cdef real power[WIDTH]
    cdef real near[WIDTH]
    cdef double d
    cdef Py_ssize_t r, j
    cdef bint again = False
    if few:
        for r in range(rows):
            for j in range(lanes):
                d = <double> x[r * row + j] - p[j]
                sum1[j] += d
                sum2[j] += d * d
        return
    memset(s1, 0, lanes * sizeof(real))
    memset(s2, 0, lanes * sizeof(real))
    accumulate_rows[real](x, row, rows, lanes, p, s1, s2)
    for j in range(lanes):
        again |= lossy(s2[j])
    if not again:
        for j in range(lanes):
            sum1[j] += s1[j]
            sum2[j] += s2[j]
        return
    for j in range(lanes):  # rare: once more, with the values of such lanes brought near 1
        power[j] = 1
        if lossy(s2[j]):
            power[j] = abs(p[j])
            for r in range(rows):
                power[j] = max(power[j], abs(x[r * row + j]))
            power[j] = <real> power_near(power[j])
        near[j] = p[j] / power[j]
        s1[j] = 0
        s2[j] = 0
    for r in range(rows):
        for j in range(lanes):
            copy[r * lanes + j] = x[r * row + j] / power[j]
    accumulate_rows[real](copy, lanes, rows, lanes, near, s1, s2)
    for j in range(lanes):
        sum1[j] += <double> s1[j] * power[j]
        sum2[j] += <double> s2[j] * power[j] * power[j]


cdef void close_block(real *p, double *count, double *sum1, double *sum2, double *lane, Py_ssize_t n) noexcept nogil:
    """Merge the blocks of n lanes with what is known of these, and begin others about their means."""
    cdef double block[4 * WIDTH]
    cdef double mean
    cdef Py_ssize_t j
    for j in range(n):
        mean = sum1[j] / max(count[j], 1.0)
        block[COUNT * n + j] = count[j]
        block[PIVOT * n + j] = p[j]
        block[SHIFT * n + j] = mean
        block[M2 * n + j] = sum2[j] - sum1[j] * mean
        p[j] = <real> (p[j] + mean)
        count[j] = sum1[j] = sum2[j] = 0
    merge(lane, block, n)


cdef void gather_lanes(const double *lane, Py_ssize_t n, Py_ssize_t width, Py_ssize_t channels, double *one) noexcept nogil:
    """The moments of a group from those of its lanes: some channels of each position of a row."""
    cdef double pivot = lane[PIVOT * n], count = 0, sum1 = 0, sum2 = 0, shift, mean
    cdef Py_ssize_t r, j
    for r in range(0, n // width):
        for j in range(r * width, r * width + channels):
            count += lane[COUNT * n + j]
            if lane[COUNT * n + j] > 0:
                sum1 += lane[COUNT * n + j] * ((lane[PIVOT * n + j] - pivot) + lane[SHIFT * n + j])
    mean = sum1 / max(count, 1.0)
    for r in range(0, n // width):
        for j in range(r * width, r * width + channels):
            if lane[COUNT * n + j] > 0:
                shift = ((lane[PIVOT * n + j] - pivot) + lane[SHIFT * n + j]) - mean
                sum2 += lane[M2 * n + j] + lane[COUNT * n + j] * (shift * shift)
    one[COUNT] = count
    one[PIVOT] = pivot
    one[SHIFT] = mean
    one[M2] = sum2


cdef void interleaved_moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *found, real _) noexcept nogil:
    cdef real xtile[AREA]
    cdef uint8_t mtile[POSITIONS]
    cdef real copy[AREA]
    cdef real size[WIDTH]
    cdef real p[WIDTH]
    cdef double count[WIDTH]
    cdef double sum1[WIDTH]
    cdef double sum2[WIDTH]
    cdef double lane[4 * WIDTH]
    cdef double one[4]
    cdef double group[4]
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t c = u.c, stop = min((chunk + 1) * job.chunk, job.S), width, fold, n, row, rows, left, i, j, run, g, field
    cdef bint few
    cdef const real *x
    cdef const uint8_t *mask
    cdef Span t = planar_span(job, &u, 0, job.S)  # a channel: all have one mask
    few = counted_of(job, &t, (SMALL + job.K - 1) // job.K) * job.K < SMALL
    t.planar = False
    while c < u.c + u.channels:
        width = strip(job, c, u.c + u.channels)
        n = widest(width)
        memset(lane, 0, 4 * n * sizeof(double))
        for j in range(n):
            count[j] = sum1[j] = sum2[j] = 0
            p[j] = 0
        t.c = c
        t.s = chunk * job.chunk
        t.lanes = width
        while t.s < stop:
            t.rows = next_rows(stop - t.s, width, AREA, &fold)
            x = load[real](job, &job.x, &t, xtile, &row)
            mask = load_mask(job, t, t.rows, mtile)
            left = t.rows
            if mask != NULL or (fold > 1 and row != width):
                left = pack[real](x, row, &t, mask, xtile)
                x = xtile
                row = width
            while left > 0:
                fold = min(n // width, left)
                rows = left // fold
                j = 0
                while j < fold * width and count[j] > 0:  # a row may hold more positions than those before
                    j += width
                if j < fold * width:
                    interleaved_pivots[real](x + j, row * fold, rows, fold * width - j,
                                             lane[COUNT * n + fold * width - 1] > 0, p + j, size + j)
                interleaved_sums[real](x, row * fold, rows, fold * width, p, few, copy, sum1, sum2)
                for j in range(fold * width):
                    count[j] += rows
                x += rows * fold * row
                left -= rows * fold
            if count[0] * (n // width) >= 4 * ROWS:
                close_block[real](p, count, sum1, sum2, lane, n)
            t.s += t.rows
        close_block[real](p, count, sum1, sum2, lane, n)
        i = 0
        while i < width:
            run = min(width - i, job.K - (c + i) % job.K)
            g = (c + i) // job.K - u.first
            gather_lanes(lane + i, n, width, run, one)
            for field in range(4):
                group[field] = found[field * u.groups + g]
            merge(group, one, 1)
            for field in range(4):
                found[field * u.groups + g] = group[field]
            i += run
        c += width


cdef void lane_parameters(const Job *job, const Unit *u, Py_ssize_t c, Py_ssize_t width, const double *known, real *a) noexcept nogil:
    """The affine of each lane: of each channel from c on, as often as positions share a row."""
    cdef Py_ssize_t i = 0, j, run, field
    cdef Standard z
    while i < width:
        run = min(width - i, job.K - (c + i) % job.K)
        standardize[real](known, u.groups, (c + i) // job.K - u.first, job.eps, &z, 0)
        weigh[real](job, u.n, c + i, run, &z, a + i)
        centre[real](run, &z, a + i)
        i += run
    for field in range(4):
        for j in range(width, widest(width)):
            a[field * WIDTH + j] = a[field * WIDTH + j - width]


cdef void interleaved_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, real _, stored *_storage) noexcept nogil:
    cdef stored xtile[PATCH]
    cdef stored ytile[PATCH]
    cdef real rtile[PATCH]
    cdef real a[PARAMETERS]
    cdef Py_ssize_t stop = min((chunk + 1) * job.chunk, job.S), fold, row, rrow, yrow
    cdef const stored *x
    cdef const real *residual
    cdef stored *y
    cdef Unit u = unit_of(job, unit)
    cdef Flow flow
    cdef Span t
    flow.stream = False
    flow.ahead = 0
    t.n = u.n
    t.c = u.c
    t.planar = False
    while t.c < u.c + u.channels:
        t.lanes = strip(job, t.c, u.c + u.channels)
        lane_parameters[real](job, &u, t.c, t.lanes, known, a)
        t.s = chunk * job.chunk
        while t.s < stop:
            t.rows = next_rows(stop - t.s, t.lanes, PATCH, &fold)
            x = in_a_row[stored](load[stored](job, &job.x, &t, xtile, &row), &row, &t, xtile)
            residual = residual_of[real](job, &t, rtile, &flow, &rrow)
            y = direct[stored](job, &job.y, &t, ytile, False, &yrow)
            if yrow != t.lanes and t.lanes < SHORT:
                y = ytile
                yrow = t.lanes
            if row != t.lanes or rrow != t.lanes or yrow != t.lanes:
                fold = 1
            flow.ahead = AHEAD * sizeof(stored) if row == t.lanes and x != xtile else 0
            lanes_activated[stored, real](x, fold * row, residual, fold * rrow, y, fold * yrow, t.rows // fold, fold * t.lanes,
                                          a, job.activation, flow)
            if y == ytile:
                move[stored](job, &job.y, &t, y, True)
            t.s += t.rows
        t.c += t.lanes

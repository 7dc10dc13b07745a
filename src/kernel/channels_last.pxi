# The walk of channels-last arrays, row by row of channels: each channel is a lane, and so is, where there are few
# channels, each of several positions that share a row. Lanes are added up by group at the end of a chunk.

cdef enum:
    STRIP = 48  # lanes that few channels are folded to, and channels of a tile that must be gathered


cdef inline Py_ssize_t fold_of(const Job *job) noexcept nogil:
    """How many positions share a row: if it can be, such that vectors are whole."""
    cdef Py_ssize_t most = max(1, STRIP // job.C), fold = most
    while fold > 1 and fold * job.C % LANES:
        fold -= 1
    return fold if fold > 1 else most


cdef inline Py_ssize_t lanes_of(const Job *job) noexcept nogil:
    """The size of an array of lanes: whole vectors, and what the last of them reach beyond."""
    return (fold_of(job) * job.C + 2 * LANES - 1) // LANES * LANES


cdef inline double *lane_array(const Job *job, const Scratch *scratch, int i) noexcept nogil:
    """One of the arrays of lanes that follow two doubles for each channel."""
    return scratch.channels + 2 * (job.C + LANES) + i * lanes_of(job)


cdef inline Span rows_of(const Job *job, const Unit *u, Py_ssize_t chunk) noexcept nogil:
    cdef Span t
    t.n = u.n
    t.c = 0
    t.s = chunk * job.chunk
    t.rows = min(job.chunk, job.S - t.s)
    t.lanes = job.C
    return t


cdef inline bint in_rows(const Job *job, const View *v, const stored *_) noexcept nogil:
    """Whether rows lie whole in memory in this type, one behind the other if several are to be one; or the array is
    absent."""
    return v.data == NULL or (
        v.storage == storage_as(_) and v.ndim == 1 and (v.channel_stride == v.itemsize or job.C == 1)
        and (fold_of(job) == 1 or v.stride[0] == job.C * v.itemsize))


cdef inline Py_ssize_t row_of(const View *v, const stored *_) noexcept nogil:
    return v.stride[0] // <Py_ssize_t> sizeof(stored)


# ---- parameters ------------------------------------------------------------------------------------


cdef inline void *lanes_after(void *lanes, Py_ssize_t c, vec like) noexcept nogil:
    return <float *> lanes + c if vec is floats else <void *> (<double *> lanes + c)


cdef void fill_lanes(const Job *job, void *lanes, vec like) noexcept nogil:
    """Repeat a parameter of each channel for each position that shares a row, and fill up the last vector."""
    cdef Py_ssize_t size = 4 if vec is floats else 8, row = job.C * size, done = row, all_rows = fold_of(job) * row
    while done < all_rows:
        memcpy(<char *> lanes + done, lanes, row)
        done += row
    memset(<char *> lanes + done, 0, lanes_of(job) * size - done)


cdef bint lane_parameters(const Task *task, const Span *whole, const double *slopes, Grid *t,
                          vec like) noexcept nogil:
    """The parameters of each lane, and whether float32 may carry them. Without slopes, those of y only."""
    cdef const Job *job = task.job
    cdef const double *known = task.known
    cdef double *scale = task.scratch.channels
    cdef double *shift = task.scratch.channels + job.C + LANES
    cdef double mean, rest, rstd, slope
    cdef Py_ssize_t g, i
    cdef bint ok = True
    cdef Part p
    t.mean = lane_array(job, task.scratch, 0)
    t.scale = lane_array(job, task.scratch, 1)
    t.shift = lane_array(job, task.scratch, 2)
    t.slope = lane_array(job, task.scratch, 3)
    t.constant = lane_array(job, task.scratch, 4)
    t.leak = job.leak
    p.n = whole.n
    p.channels = job.K
    for g in range(whole.c // job.K, (whole.c + whole.lanes) // job.K):
        p.c = g * job.K
        mean = known[PIVOT * job.G + g]
        rest = rest_of(mean, like)
        rstd = rstd_of(job, known, job.G, g)
        ok &= channel_parameters(job, &p, rstd, rest, scale + p.c, shift + p.c) and comfortable(mean)
        for i in range(p.c, p.c + job.K):
            put(t.mean, i, mean, like)
            put(t.scale, i, scale[i], like)
            put(t.shift, i, shift[i], like)
        if slopes != NULL:
            slope = rstd * rstd * slopes[2 * g + 1]
            ok &= sums_carried(rstd, mean) and comfortable(slope) and known[COUNT * job.G + g] > 0
            for i in range(p.c, p.c + job.K):
                put(t.slope, i, -slope, like)
                put(t.constant, i, slope * rest - rstd * slopes[2 * g], like)
    if whole.lanes == job.C:
        for i in range(5):
            fill_lanes(job, lane_array(job, task.scratch, i), like)
    return vec is doubles or ok


cdef inline Grid strip_of(const Grid *g, const Span *t, vec like) noexcept nogil:
    """The parameters of a tile, whose rows lie one behind the other."""
    cdef Grid s = g[0]
    s.mean = lanes_after(s.mean, t.c, like)
    s.scale = lanes_after(s.scale, t.c, like)
    s.shift = lanes_after(s.shift, t.c, like)
    s.slope = lanes_after(s.slope, t.c, like)
    s.constant = lanes_after(s.constant, t.c, like)
    s.rows = t.rows
    s.lanes = s.xrow = s.orow = s.yrow = t.lanes
    s.flow.stream = False
    s.flow.ahead = 0
    return s


# ---- sums ------------------------------------------------------------------------------------------


cdef struct Lanes:  # of channels that are summed together: pivots, in the type that is summed in; and their sums
    bint wide  # float64
    void *pivot
    double *sum
    double *product
    double *sum_low
    double *product_low


cdef inline Lanes lanes_from(const Job *job, const Scratch *scratch, bint wide, void *pivot, int i) noexcept nogil:
    """With arrays of lanes from the i-th on."""
    return Lanes(wide, pivot, lane_array(job, scratch, i), lane_array(job, scratch, i + 1), lane_array(job, scratch, i + 2),
                 lane_array(job, scratch, i + 3))


cdef void add_positions(const Job *job, const stored *x, const stored *dy, Rows *t, const Lanes *l, Py_ssize_t c,
                        vec like) noexcept nogil:
    """Add rows of so many channels from channel c on."""
    cdef Py_ssize_t fold = fold_of(job), positions = t.rows, channels = t.lanes, done
    t.pivot = lanes_after(l.pivot, c, like)
    t.sum = l.sum + c
    t.product = l.product + c
    t.sum_low = l.sum_low + c
    t.product_low = l.product_low + c
    if fold > 1:
        t.rows = positions // fold
        t.lanes = fold * channels
        t.row = t.dyrow = fold * channels
    add_rows(x, dy, t, like)
    if positions % fold:
        done = t.rows * t.row
        t.rows = 1
        t.lanes = positions % fold * channels
        add_rows(x + done, after(dy, done), t, like)


cdef inline void add_in(const Job *job, const stored *x, const stored *dy, Rows *t, const Lanes *l, Py_ssize_t c,
                        vec like) noexcept nogil:
    """In the type of the pivots."""
    if l.wide:
        add_positions(job, x, dy, t, l, c, gn_all_doubles(0))
    else:
        add_positions(job, x, dy, t, l, c, like)


cdef inline Py_ssize_t rows_together(const Job *job, Py_ssize_t left) noexcept nogil:
    """How many of the rows left make a tile, cut as add_rows cuts those that need no tile."""
    cdef Py_ssize_t rows = STEP * fold_of(job)
    return rows if left >= 2 * rows else left


cdef const stored *keep_rows(const Task *task, const Span *whole, const Grid *g, const stored *_, vec like) noexcept nogil:
    """dy' of a chunk, row by row, if it is kept; else NULL."""
    cdef Span t = whole[0]
    cdef Py_ssize_t stop = whole.s + whole.rows
    cdef Grid strip
    if g == NULL or kept_tile(task, whole, _) == NULL:
        return NULL
    while t.s < stop:
        t.rows = min(stop - t.s, TILE // t.lanes)
        strip = strip_of(g, &t, like)
        gradient_tile(task, GRID, &t, x_of(task.job, &t, task.scratch, _), &strip, like)
        t.s += t.rows
    return kept_tile(task, whole, _)


cdef Py_ssize_t sum_rows(const Task *task, const Span *whole, const Lanes *l, const Grid *g, const stored *_,
                         vec like) noexcept nogil:
    """The sums of each channel of a chunk about its pivot: of its moments, or with parameters, of its gradient. Returns
    how many rows count."""
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const stored *x
    cdef const stored *dy
    cdef const stored *kept = keep_rows(task, whole, g, _, like)
    cdef Py_ssize_t count = whole.rows, stop = whole.s + whole.rows, i, c
    cdef Span t = whole[0]
    cdef double rest
    cdef Rows rows
    cdef Grid strip
    memset(l.sum, 0, 4 * lanes_of(job) * sizeof(double))
    if l.wide:
        fill_lanes(job, l.pivot, gn_all_doubles(0))
    else:
        fill_lanes(job, l.pivot, like)
    rows.rows = t.rows
    rows.lanes = job.C
    rows.row = rows.dyrow = row_of(&job.x, _)
    if in_rows(job, &job.x, _) and (job.mask.data == NULL if g == NULL else
                                    kept != NULL or (plain_gradient(job) and in_rows(job, &job.dy, _))):
        rows.ahead = job.ahead if g == NULL and rows.row == job.C else 0
        dy = kept
        if kept != NULL:
            rows.dyrow = job.C
        elif g != NULL:
            rows.dyrow = row_of(&job.dy, _)
            dy = start_of(&job.dy, &t, _)
        add_in(job, start_of(&job.x, &t, _), dy, &rows, l, 0, like)
    else:
        rows.ahead = 0
        for c from 0 <= c < job.C by STRIP:
            t.c = c
            t.s = whole.s
            t.lanes = min(STRIP, job.C - c)
            count = 0
            while t.s < stop:
                t.rows = rows.rows = rows_together(job, stop - t.s)
                dy = NULL
                rows.dyrow = t.lanes
                if g == NULL:
                    x = load_tile(job, &job.x, &t, <stored *> scratch.x, &rows.row)
                    rows.rows = pack(x, rows.row, &t, load_mask(job, t, scratch.mask), <stored *> scratch.x)
                    x = <stored *> scratch.x
                else:
                    x = x_of(job, &t, scratch, _)
                if kept != NULL:
                    dy = kept + (t.s - whole.s) * job.C + c
                    rows.dyrow = job.C
                elif g != NULL:
                    strip = strip_of(g, &t, like)
                    dy = gradient_tile(task, GRID, &t, x, &strip, like)
                rows.lanes = rows.row = t.lanes
                count += rows.rows
                add_in(job, x, dy, &rows, l, c, like)
                t.s += t.rows
    for i in range(1, fold_of(job)):
        for c in range(job.C):
            l.sum[c] = sum_of(l.sum[c], l.sum[i * job.C + c], &rest)
            l.sum_low[c] += l.sum_low[i * job.C + c] + rest
            l.product[c] = sum_of(l.product[c], l.product[i * job.C + c], &rest)
            l.product_low[c] += l.product_low[i * job.C + c] + rest
    return count


# ---- moments ---------------------------------------------------------------------------------------


cdef void pivots_of(const stored *x, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t channels, void *pivot,
                    vec like) noexcept nogil:
    """About the mean of each channel, from SAMPLES rows; or the first of fewer."""
    cdef Py_ssize_t w = width(like), j = 0, k, r, n
    cdef vec v[SAMPLES]
    for k in range((channels + w - 1) // w):
        n = min(w, channels - j)
        for r in range(SAMPLES):
            v[r] = some_of(x + (r * row if r < rows else 0) + j, n, like)
        put_lane(pivot, j, on_grid(middle(v[0], v[1], v[2], v[3]), size_of(v[0], v[1], v[2], v[3])))
        j += w


cdef void sample_pivots(const Job *job, const Span *whole, const Scratch *scratch, void *pivot, const stored *_,
                        vec like) noexcept nogil:
    """From rows that are spread over a chunk, so that data that drift stay near: each the first from there that
    counts."""
    cdef Py_ssize_t rows = 1 if vec is doubles and stored is not double else min(SAMPLES, whole.rows), r, c, row
    cdef Py_ssize_t stop = whole.s + whole.rows
    cdef stored *tile = <stored *> scratch.x
    cdef const stored *x
    cdef Span t = whole[0]
    t.rows = 1
    if job.mask.data == NULL and in_rows(job, &job.x, _):
        pivots_of(<const stored *> address(&job.x, t.n, t.c, t.s), row_of(&job.x, _) * (whole.rows // rows), rows,
                  job.C, pivot, like)
        return
    for c from 0 <= c < job.C by TILE // SAMPLES:
        t.c = c
        t.lanes = min(TILE // SAMPLES, job.C - c)
        for r in range(rows):
            t.s = whole.s + whole.rows // rows * r
            while job.mask.data != NULL and t.s < stop and load_mask(job, t, scratch.mask)[0] == 0:
                t.s += 1
            t.s = first_counted(job, whole, scratch) if t.s == stop else t.s
            x = load_tile(job, &job.x, &t, tile + r * t.lanes, &row)
            memmove(tile + r * t.lanes, x, t.lanes * sizeof(stored))
        pivots_of(tile, t.lanes, rows, t.lanes, lanes_after(pivot, c, like), like)


cdef Py_ssize_t first_counted(const Job *job, const Span *whole, const Scratch *scratch) noexcept nogil:
    cdef Span t = whole[0]
    t.rows = 1
    while load_mask(job, t, scratch.mask)[0] == 0:
        t.s += 1
    return t.s


cdef inline doubles wide_lanes(const void *lanes, Py_ssize_t i, vec like) noexcept nogil:
    if vec is floats:
        return gn_doubles_of_float(<const float *> lanes + i)
    else:
        return gn_doubles_of_double(<const double *> lanes + i)


cdef inline double wide_lane(const void *lanes, Py_ssize_t i, vec like) noexcept nogil:
    return (<const float *> lanes)[i] if vec is floats else (<const double *> lanes)[i]


cdef inline void move_sums(const Lanes *l, Py_ssize_t c, Py_ssize_t K, double count, double centre, double *sums,
                           const stored *_, vec like) noexcept nogil:
    """The sums of a group's channels, brought from their pivots to a centre, in LANES lanes; and what rounding leaves
    out of them."""
    cdef doubles n = gn_all_doubles(count), delta, sum, product, low
    cdef double d
    cdef Py_ssize_t i = c, j, k
    memset(sums, 0, 4 * LANES * sizeof(double))
    for j in range(K // LANES):
        for k in range(LANES // DOUBLES):
            delta = wide_lanes(l.pivot, i, like) - gn_all_doubles(centre)
            sum = gn_doubles_of_double(l.sum + i)
            product = gn_doubles_of_double(l.product + i)
            if stored is double:
                low = gn_doubles_of_double(l.sum_low + i)
                add_lanes_exactly(sums + k * DOUBLES, sums + (2 * LANES + k * DOUBLES), gn_fma_doubles(n, delta, sum))
                gn_add_doubles(sums + (2 * LANES + k * DOUBLES), low)
                sum += low
                product += gn_doubles_of_double(l.product_low + i)
                product = gn_fma_doubles(delta, gn_fma_doubles(n, delta, sum + sum), product)
                add_lanes_exactly(sums + LANES + k * DOUBLES, sums + (3 * LANES + k * DOUBLES), product)
            else:
                gn_add_doubles(sums + k * DOUBLES, gn_fma_doubles(n, delta, sum))
                product = gn_fma_doubles(delta, gn_fma_doubles(n, delta, sum + sum), product)
                gn_add_doubles(sums + LANES + k * DOUBLES, product)
            i += DOUBLES
    for k in range(K % LANES):
        d = wide_lane(l.pivot, i + k, like) - centre
        sums[k] += (count * d + l.sum[i + k]) + l.sum_low[i + k]
        sums[LANES + k] += l.product[i + k] + l.product_low[i + k]
        sums[LANES + k] += d * (count * d + 2 * (l.sum[i + k] + l.sum_low[i + k]))


cdef void gather_group(const Lanes *l, Py_ssize_t c, Py_ssize_t K, double count, double *found, Py_ssize_t groups,
                       const stored *_, vec like) noexcept nogil:
    """The moments of a group from the sums of its channels: about the pivot of the first, which tells the mean, and
    then about what is near it and as short as pivots are, so that the differences are exact."""
    cdef double sums[4 * LANES]
    cdef double centre = wide_lane(l.pivot, c, like), sum, square, sum_low, square_low, shift
    move_sums(l, c, K, count, centre, sums, _, like)
    gn_total(sums, &sum, &square)
    shift = sum / max(count * K, 1.0)
    centre = settled(centre + shift, abs(centre) + abs(shift), gn_all_doubles(0))
    move_sums(l, c, K, count, centre, sums, _, like)
    gn_total(sums, &sum, &square)
    gn_total(sums + 2 * LANES, &sum_low, &square_low)
    put_moments(count * K, sum + sum_low, square + square_low, centre, 0, found, groups)


cdef bint rows_moments(const Task *task, const Span *whole, const stored *_, vec like) noexcept nogil:
    """The moments of a chunk, of the groups that are not known yet; returns whether float32 carried all."""
    cdef const Job *job = task.job
    cdef double *found = task.found
    cdef Lanes l = lanes_from(job, task.scratch, vec is doubles, lane_array(job, task.scratch, 0), 1)
    cdef Py_ssize_t g, count
    cdef bint ok = True
    sample_pivots(job, whole, task.scratch, l.pivot, _, like)
    count = sum_rows(task, whole, &l, NULL, _, like)
    for g in range(job.G):
        if not carried(found[M2 * job.G + g]):
            gather_group(&l, g * job.K, job.K, count, found + g, job.G, _, like)
            ok &= carried(found[M2 * job.G + g])
    return vec is doubles or ok


cdef void channels_last_moments(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef Unit u = unit_of(job, task.unit)
    cdef Span t = rows_of(job, &u, task.chunk)
    cdef Py_ssize_t count = counted_rows(job, t, task.scratch.mask)
    if count == 0:
        return
    if count * job.K < SMALL or not rows_moments(task, &t, _, like):
        rows_moments(task, &t, _, gn_all_doubles(0))


cdef Py_ssize_t counted_rows(const Job *job, Span t, uint8_t *buffer) noexcept nogil:
    """How many rows of a chunk count, or at least SMALL."""
    cdef Py_ssize_t count = 0, stop = t.s + t.rows, r
    cdef const uint8_t *mask
    if job.mask.data == NULL:
        return t.rows
    while t.s < stop and count < SMALL:
        t.rows = min(stop - t.s, TILE)
        mask = load_mask(job, t, buffer)
        for r in range(t.rows):
            count += mask[r] != 0
        t.s += t.rows
    return count


# ---- y and dx --------------------------------------------------------------------------------------


cdef void apply_positions(const Job *job, int kind, const stored *x, const stored *other, stored *y, Grid *t,
                          vec like) noexcept nogil:
    """Rows of all channels, of which several share one."""
    cdef Py_ssize_t fold = fold_of(job), left = t.rows % fold, done
    if fold > 1:
        t.rows //= fold
        t.lanes = t.xrow = t.orow = t.yrow = fold * job.C
    apply_rows(kind, x, other, y, t, like)
    if left:
        done = t.rows * t.lanes
        t.rows = 1
        t.lanes = left * job.C
        apply_rows(kind, x + done, after(other, done), y + done, t, like)


cdef inline bint streams(const Job *job, const View *other, const void *y) noexcept nogil:
    """Whether rows can be streamed from registers: else they would share lines."""
    return (gn_before_line(y) == 0 and job.y.stride[0] % 64 == 0 and job.y.data != job.x.data
            and job.y.data != other.data)


cdef void apply_chunk(const Task *task, int kind, const Span *whole, Grid *g, const stored *_, vec like) noexcept nogil:
    """y or dx of some channels, where they lie or tile by tile."""
    cdef const Job *job = task.job
    cdef const View *other = &job.dy if kind == DX else &job.residual
    cdef const stored *kept = kept_tile(task, whole, _) if kind == DX else NULL
    cdef stored *y = <stored *> start_of(&job.y, whole, _)
    cdef Py_ssize_t stop_c = whole.c + whole.lanes, stop = whole.s + whole.rows
    cdef Span t = whole[0]
    cdef Grid strip
    g.flow.ahead = job.ahead
    g.flow.stream = job.y.streamed
    if (t.lanes == job.C and in_rows(job, &job.x, _) and in_rows(job, &job.y, _)
            and (not job.y.streamed or streams(job, other, y))
            and (kept != NULL or in_rows(job, other, _)) and (kind != DX or plain_dx(task, kept))):
        g.rows = t.rows
        g.lanes = t.lanes
        g.xrow = row_of(&job.x, _)
        g.orow = row_of(other, _) if kept == NULL else job.C
        g.yrow = row_of(&job.y, _)
        apply_positions(job, kind, start_of(&job.x, &t, _), start_of(other, &t, _) if kept == NULL else kept, y, g, like)
        return
    while t.c < stop_c:
        t.lanes = min(TILE, stop_c - t.c)
        t.s = whole.s
        while t.s < stop:
            t.rows = min(stop - t.s, TILE // t.lanes)
            strip = strip_of(g, &t, like)
            apply_tile(task, GRID, kind, &t, &strip, _, like)
            t.s += t.rows
        t.c += t.lanes


cdef inline Span group_of(const Job *job, const Span *whole, Py_ssize_t g) noexcept nogil:
    cdef Span t = whole[0]
    t.c = g * job.K
    t.lanes = job.K
    return t


cdef void channels_last_apply(const Task *task, int kind, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const double *slopes = task.known + slopes_at(job) if kind == DX else NULL
    cdef Unit u = unit_of(job, task.unit)
    cdef Span t = rows_of(job, &u, task.chunk), part
    cdef Py_ssize_t i
    cdef Grid g
    if lane_parameters(task, &t, slopes, &g, like):
        apply_chunk(task, kind, &t, &g, _, like)
        return
    for i in range(job.G):
        part = group_of(job, &t, i)
        if lane_parameters(task, &part, slopes, &g, like):
            apply_chunk(task, kind, &part, &g, _, like)
        else:
            lane_parameters(task, &part, slopes, &g, gn_all_doubles(0))
            apply_chunk(task, kind, &part, &g, <const double *> NULL, gn_all_doubles(0))


# ---- the gradient's sums ---------------------------------------------------------------------------


cdef bint sums_chunk(const Task *task, const Span *whole, double *sums, const stored *_, vec like) noexcept nogil:
    """The sums of the groups that are not known yet, which stand at infinity; returns whether float32 carried all."""
    cdef const Job *job = task.job
    cdef Grid grid
    cdef Lanes l
    cdef Span t
    cdef Py_ssize_t g, c
    cdef double mean
    cdef bint ok, all_ok = True
    lane_parameters(task, whole, NULL, &grid, like)
    l = lanes_from(job, task.scratch, vec is doubles, grid.mean, 5)
    if vec is floats and job.K * job.S < FEW:
        l.wide = True
        l.pivot = lane_array(job, task.scratch, 9)
        for c in range(job.C):
            put(l.pivot, c, (<const float *> grid.mean)[c], gn_all_doubles(0))
    sum_rows(task, whole, &l, &grid, _, like)
    for g in range(job.G):
        c = g * job.K
        mean = task.known[PIVOT * job.G + g]
        t = group_of(job, whole, g)
        ok = centre_sums(job.K, rest_of(mean, like), l.sum + c, l.product + c)
        ok &= sums_carried(rstd_of(job, task.known, job.G, g), mean)
        if vec is doubles or (ok and lane_parameters(task, &t, NULL, &grid, like)):
            if sums[c] == INFINITY:
                memcpy(sums + c, l.sum + c, job.K * sizeof(double))
                memcpy(sums + job.C + c, l.product + c, job.K * sizeof(double))
        else:
            all_ok = False
    return all_ok


cdef void channels_last_sums(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef Unit u = unit_of(job, task.unit)
    cdef Span t = rows_of(job, &u, task.chunk)
    cdef double *sums = task.found + sums_at(job)
    cdef Py_ssize_t g
    for g in range(job.G):
        sums[g * job.K] = INFINITY
    if not sums_chunk(task, &t, sums, _, like):
        sums_chunk(task, &t, sums, <const double *> NULL, gn_all_doubles(0))

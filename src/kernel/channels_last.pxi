# The walk of channels-last arrays, row by row of channels: each channel is a lane, and so is, where there are few channels,
# each of several positions that share a row. Lanes are added up by group at the end of a chunk.

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
    """Whether rows lie whole in memory in this type, one behind the other if several are to be one; or the array is absent."""
    return v.data == NULL or (
        v.storage == storage_as(_) and v.ndim == 1 and (v.channel_stride == v.itemsize or job.C == 1)
        and (fold_of(job) == 1 or v.stride[0] == job.C * v.itemsize))


cdef inline Py_ssize_t row_of(const View *v, const stored *_) noexcept nogil:
    return v.stride[0] // <Py_ssize_t> sizeof(stored)


# ---- sums ------------------------------------------------------------------------------------------


cdef struct Lanes:  # of the channels from the first on that are summed together, in the compute type: pivots; and their sums
    void *pivot
    double *sum
    double *product


cdef void fill_lanes(const Job *job, void *lanes, vec like) noexcept nogil:
    """Repeat a parameter of each channel for each position that shares a row, and fill up the last vector."""
    cdef Py_ssize_t size = 4 if vec is floats else 8, row = job.C * size, done = row, all_rows = fold_of(job) * row
    while done < all_rows:
        memcpy(<char *> lanes + done, lanes, row)
        done += row
    memset(<char *> lanes + done, 0, lanes_of(job) * size - done)


cdef void clear_lanes(const Job *job, const Lanes *l, vec like) noexcept nogil:
    memset(l.sum, 0, lanes_of(job) * sizeof(double))
    memset(l.product, 0, lanes_of(job) * sizeof(double))
    fill_lanes(job, l.pivot, like)


cdef void add_positions(const Job *job, const stored *x, const stored *dy, Rows *t, const Lanes *l, Py_ssize_t c,
                        vec like) noexcept nogil:
    """Add rows of so many channels from channel c on."""
    cdef Py_ssize_t fold = fold_of(job), positions = t.rows, channels = t.lanes, done
    t.pivot = <float *> l.pivot + c if vec is floats else <void *> (<double *> l.pivot + c)
    t.sum = l.sum + c
    t.product = l.product + c
    if fold > 1:
        t.rows = positions // fold
        t.lanes = fold * channels
        t.row = t.dyrow = fold * channels
    add_rows(x, dy, t, like)
    if positions % fold:
        done = t.rows * t.row
        t.rows = 1
        t.lanes = positions % fold * channels
        add_rows(x + done, dy if dy == NULL else dy + done, t, like)


cdef inline bint next_rows(const Job *job, Span *t, Py_ssize_t left) noexcept nogil:
    """The next rows of a tile that must be gathered, cut as add_rows cuts those that need not."""
    cdef Py_ssize_t rows = STEP * fold_of(job)
    t.rows = rows if left >= 2 * rows else left
    return t.rows > 0


cdef void fold_lanes(const Job *job, const Lanes *l) noexcept nogil:
    cdef Py_ssize_t i, c
    for i in range(1, fold_of(job)):
        for c in range(job.C):
            l.sum[c] += l.sum[i * job.C + c]
            l.product[c] += l.product[i * job.C + c]


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
    """From rows that are spread over a chunk, so that data that drift stay near: each the first from there that counts."""
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
        pivots_of(tile, t.lanes, rows, t.lanes, <float *> pivot + c if vec is floats else <void *> (<double *> pivot + c), like)


cdef Py_ssize_t first_counted(const Job *job, const Span *whole, const Scratch *scratch) noexcept nogil:
    cdef Span t = whole[0]
    t.rows = 1
    while load_mask(job, t, scratch.mask)[0] == 0:
        t.s += 1
    return t.s


cdef Py_ssize_t sum_rows(const Job *job, const Span *whole, const Scratch *scratch, const Lanes *l, const stored *_,
                         vec like) noexcept nogil:
    """Sum a chunk's rows for its moments; returns how many count."""
    cdef stored *tile = <stored *> scratch.x
    cdef const stored *x
    cdef Py_ssize_t c, count = whole.rows, left
    cdef Span t = whole[0]
    cdef Rows rows
    rows.dyrow = 0
    if job.mask.data == NULL and in_rows(job, &job.x, _):
        rows.row = row_of(&job.x, _)
        rows.rows = t.rows
        rows.lanes = job.C
        rows.ahead = job.ahead if rows.row == job.C else 0
        add_positions(job, <const stored *> address(&job.x, t.n, t.c, t.s), <const stored *> NULL, &rows, l, 0, like)
        return count
    rows.ahead = 0
    for c from 0 <= c < job.C by STRIP:
        t.c = c
        t.s = whole.s
        t.lanes = min(STRIP, job.C - c)
        left = whole.rows
        count = 0
        while next_rows(job, &t, left):
            x = load_tile(job, &job.x, &t, tile, &rows.row)
            rows.rows = t.rows
            if job.mask.data != NULL:
                rows.rows = pack(x, rows.row, &t, load_mask(job, t, scratch.mask), tile)
            elif x != tile:
                pack(x, rows.row, &t, NULL, tile)
            rows.row = rows.lanes = t.lanes
            count += rows.rows
            add_positions(job, tile, <const stored *> NULL, &rows, l, c, like)
            t.s += t.rows
            left -= t.rows
    return count


cdef inline doubles pivots_at(const void *pivot, Py_ssize_t i, vec like) noexcept nogil:
    if vec is floats:
        return gn_doubles_of_float(<const float *> pivot + i)
    else:
        return gn_doubles_of_double(<const double *> pivot + i)


cdef inline double pivot_at(const void *pivot, Py_ssize_t i, vec like) noexcept nogil:
    return (<const float *> pivot)[i] if vec is floats else (<const double *> pivot)[i]


cdef void gather_group(const Lanes *l, Py_ssize_t c, Py_ssize_t K, double count, double *found, Py_ssize_t groups,
                       vec like) noexcept nogil:
    """The moments of a group from the sums of its channels: first its mean, then the squares about it."""
    cdef double sums[2 * LANES]
    cdef double first = pivot_at(l.pivot, c, like), shift, square, d
    cdef doubles n = gn_all_doubles(count), delta
    cdef Py_ssize_t i, k, j
    memset(sums, 0, sizeof(sums))
    i = c
    for j in range(K // LANES):
        for k in range(LANES // DOUBLES):
            gn_add_doubles(sums + k * DOUBLES, gn_fma_doubles(n, pivots_at(l.pivot, i, like) - gn_all_doubles(first),
                                                              gn_doubles_of_double(l.sum + i)))
            i += DOUBLES
    for j in range(K % LANES):
        sums[j] += count * (pivot_at(l.pivot, i + j, like) - first) + l.sum[i + j]
    gn_total(sums, &shift, &square)
    shift /= max(count * K, 1.0)
    i = c
    for j in range(K // LANES):
        for k in range(LANES // DOUBLES):
            delta = (pivots_at(l.pivot, i, like) - gn_all_doubles(first)) - gn_all_doubles(shift)
            gn_add_doubles(sums + LANES + k * DOUBLES, gn_fma_doubles(delta, gn_fma_doubles(n, delta,
                                                                                            gn_all_doubles(2) * gn_doubles_of_double(l.sum + i)),
                                                                      gn_doubles_of_double(l.product + i)))
            i += DOUBLES
    for j in range(K % LANES):
        d = (pivot_at(l.pivot, i + j, like) - first) - shift
        sums[LANES + j] += d * (count * d + 2 * l.sum[i + j]) + l.product[i + j]
    gn_total(sums, &d, &square)
    found[COUNT * groups] = count * K
    found[PIVOT * groups] = first
    found[SHIFT * groups] = shift
    found[M2 * groups] = square


cdef bint rows_moments(const Job *job, const Span *whole, double *found, const Scratch *scratch, const stored *_,
                       vec like) noexcept nogil:
    """The moments of a chunk, of the groups that are not known yet; returns whether float32 carried all."""
    cdef Lanes l
    cdef Py_ssize_t g, count
    cdef bint ok = True
    l.pivot = lane_array(job, scratch, 0)
    l.sum = lane_array(job, scratch, 1)
    l.product = lane_array(job, scratch, 2)
    sample_pivots(job, whole, scratch, l.pivot, _, like)
    clear_lanes(job, &l, like)
    count = sum_rows(job, whole, scratch, &l, _, like)
    fold_lanes(job, &l)
    for g in range(job.G):
        if not carried(found[M2 * job.G + g]):
            gather_group(&l, g * job.K, job.K, count, found + g, job.G, like)
            ok &= carried(found[M2 * job.G + g])
    return vec is doubles or ok


cdef void channels_last_moments(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef double *found = task.found
    cdef Unit u = unit_of(job, task.unit)
    cdef Span t = rows_of(job, &u, task.chunk)
    cdef Py_ssize_t count = job.S
    if job.mask.data != NULL:
        count = counted(job, t, SMALL, scratch.mask)
        if count == 0:
            return
    if count * job.K < SMALL or not rows_moments(job, &t, found, scratch, _, like):
        rows_moments(job, &t, found, scratch, _, gn_all_doubles(0))


# ---- parameters ------------------------------------------------------------------------------------


cdef bint lane_parameters(const Job *job, const Span *whole, const double *known, const double *slopes,
                          const Scratch *scratch, Grid *t, vec like) noexcept nogil:
    """The parameters of each lane, and whether float32 may carry them. Without slopes, those of y only."""
    cdef double *scale = scratch.channels
    cdef double *shift = scratch.channels + job.C + LANES
    cdef double mean, rest, rstd, slope
    cdef Py_ssize_t g, i
    cdef bint ok = True
    cdef Part p
    t.mean = lane_array(job, scratch, 0)
    t.scale = lane_array(job, scratch, 1)
    t.shift = lane_array(job, scratch, 2)
    t.slope = lane_array(job, scratch, 3)
    t.constant = lane_array(job, scratch, 4)
    p.n = whole.n
    p.channels = job.K
    for g in range(whole.c // job.K, (whole.c + whole.lanes) // job.K):
        p.c = g * job.K
        mean = known[PIVOT * job.G + g]
        rest = mean - in_type(mean, like)
        rstd = rstd_of(job, known, job.G, g)
        ok &= channel_parameters(job, &p, rstd, rest, scale + p.c, shift + p.c) and comfortable(mean)
        for i in range(p.c, p.c + job.K):
            put(t.mean, i, mean, like)
            put(t.scale, i, scale[i], like)
            put(t.shift, i, shift[i], like)
        if slopes != NULL:
            slope = rstd * rstd * slopes[2 * g + 1]
            ok &= 2.0 ** -40 < rstd < 2.0 ** 40 and abs(slope) < 2.0 ** 100 and known[COUNT * job.G + g] > 0
            for i in range(p.c, p.c + job.K):
                put(t.slope, i, -slope, like)
                put(t.constant, i, slope * rest - rstd * slopes[2 * g], like)
    if whole.lanes == job.C:
        for i in range(5):
            fill_lanes(job, lane_array(job, scratch, i), like)
    return vec is doubles or ok


cdef inline Grid strip_of(const Grid *t, Py_ssize_t c, vec like) noexcept nogil:
    """The parameters from channel c on."""
    cdef Py_ssize_t bytes = c * (4 if vec is floats else 8)
    cdef Grid s = t[0]
    s.mean = <char *> s.mean + bytes
    s.scale = <char *> s.scale + bytes
    s.shift = <char *> s.shift + bytes
    s.slope = <char *> s.slope + bytes
    s.constant = <char *> s.constant + bytes
    return s


cdef inline Py_ssize_t fold_rows(const Job *job, Grid *t) noexcept nogil:
    """Let several positions share a row; returns how many are left over, which begin behind these rows."""
    cdef Py_ssize_t fold = fold_of(job), left = t.rows % fold
    if fold == 1 or t.lanes < job.C:
        return 0
    t.rows //= fold
    t.lanes = t.xrow = t.rrow = t.yrow = fold * job.C
    return left


cdef inline Py_ssize_t last_row(const Job *job, Grid *t, Py_ssize_t left) noexcept nogil:
    cdef Py_ssize_t done = t.rows * t.lanes
    t.rows = 1
    t.lanes = left * job.C
    return done


cdef void affine_positions(const Job *job, const stored *x, const stored *residual, stored *y, const Grid *whole,
                           int activation, vec like) noexcept nogil:
    cdef Grid t = whole[0]
    cdef Py_ssize_t left = fold_rows(job, &t), done
    affine_rows(x, residual, y, &t, activation, like)
    if left:
        done = last_row(job, &t, left)
        affine_rows(x + done, residual if residual == NULL else residual + done, y + done, &t, activation, like)


cdef void dx_positions(const Job *job, const stored *x, const stored *dy, stored *dx, const Grid *whole,
                       vec like) noexcept nogil:
    cdef Grid t = whole[0]
    cdef Py_ssize_t left = fold_rows(job, &t), done
    dx_rows(x, dy, dx, &t, like)
    if left:
        done = last_row(job, &t, left)
        dx_rows(x + done, dy + done, dx + done, &t, like)


# ---- y ---------------------------------------------------------------------------------------------


cdef inline bint streams(const Job *job, const void *y, Py_ssize_t row) noexcept nogil:
    """Whether rows can be streamed from registers: else they would share lines."""
    return gn_before_line(y) == 0 and row % 64 == 0 and job.y.data != job.x.data


cdef inline stored *packed(const Job *job, const View *v, const Span *t, stored *tile) noexcept nogil:
    """A span's rows, one behind the other."""
    if v.data == NULL:
        return NULL
    move(job, v, t, tile, False)
    return tile


cdef void affine_chunk(const Job *job, const Span *whole, Grid *g, const Scratch *scratch, const stored *_,
                       vec like) noexcept nogil:
    cdef const stored *x = <const stored *> address(&job.x, whole.n, 0, whole.s)
    cdef const stored *residual = <const stored *> NULL if job.residual.data == NULL else <const stored *> address(&job.residual, whole.n, 0, whole.s)
    cdef Py_ssize_t stop = whole.c + whole.lanes
    cdef stored *y = <stored *> address(&job.y, whole.n, 0, whole.s)
    cdef Py_ssize_t left
    cdef Span t = whole[0]
    cdef Grid strip
    g.rows = t.rows
    g.lanes = t.lanes
    g.flow.ahead = job.ahead
    g.flow.stream = job.y.streamed and streams(job, y, job.y.stride[0])
    if (t.lanes == job.C and in_rows(job, &job.x, _) and in_rows(job, &job.residual, _) and in_rows(job, &job.y, _)
            and g.flow.stream == job.y.streamed):
        g.xrow = row_of(&job.x, _)
        g.rrow = row_of(&job.residual, _)
        g.yrow = row_of(&job.y, _)
        affine_positions(job, x, residual, y, g, job.activation, like)
        return
    g.flow.stream = False
    g.flow.ahead = 0
    while t.c < stop:
        t.lanes = min(TILE, stop - t.c)
        t.s = whole.s
        left = whole.rows
        while left > 0:
            t.rows = min(left, TILE // t.lanes)
            strip = strip_of(g, t.c, like)
            strip.rows = t.rows
            strip.lanes = strip.xrow = strip.rrow = strip.yrow = t.lanes
            x = packed(job, &job.x, &t, <stored *> scratch.x)
            residual = packed(job, &job.residual, &t, <stored *> scratch.y)
            affine_positions(job, x, residual, <stored *> scratch.y, &strip, job.activation, like)
            move(job, &job.y, &t, <stored *> scratch.y, True)
            t.s += t.rows
            left -= t.rows
        t.c += t.lanes


cdef inline Span group_of(const Job *job, const Span *whole, Py_ssize_t g) noexcept nogil:
    cdef Span t = whole[0]
    t.c = g * job.K
    t.lanes = job.K
    return t


cdef void channels_last_affine(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef Unit u = unit_of(job, task.unit)
    cdef Span t = rows_of(job, &u, task.chunk), part
    cdef Py_ssize_t i
    cdef Grid g
    if lane_parameters(job, &t, known, NULL, scratch, &g, like):
        affine_chunk(job, &t, &g, scratch, _, like)
        return
    for i in range(job.G):
        part = group_of(job, &t, i)
        if lane_parameters(job, &part, known, NULL, scratch, &g, like):
            affine_chunk(job, &part, &g, scratch, _, like)
        else:
            lane_parameters(job, &part, known, NULL, scratch, &g, gn_all_doubles(0))
            affine_chunk(job, &part, &g, scratch, <const double *> NULL, gn_all_doubles(0))


# ---- the gradient ----------------------------------------------------------------------------------


cdef inline bint plain_rows(const Job *job, const stored *_) noexcept nogil:
    """Whether x and dy can be read where they lie."""
    return (job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL
            and in_rows(job, &job.x, _) and in_rows(job, &job.dy, _))


cdef void rows_gradient(const Job *job, const Span *t, const Grid *g, const Scratch *scratch, const stored **x,
                        const stored **dy, vec like) noexcept nogil:
    """x and dy' of some rows of some channels, one behind the other."""
    cdef Grid strip
    x[0] = packed(job, &job.x, t, <stored *> scratch.x)
    if job.activation != IDENTITY:
        strip = strip_of(g, t.c, like)
        strip.rows = t.rows
        strip.lanes = strip.xrow = strip.rrow = strip.yrow = t.lanes
        strip.flow.stream = False
        strip.flow.ahead = 0
        affine_positions(job, x[0], packed(job, &job.residual, t, <stored *> scratch.y), <stored *> scratch.y, &strip,
                         IDENTITY, like)
    gradient_tile(job, t, scratch.y, scratch, x, dy, like)


cdef void sum_products(const Job *job, const Span *whole, const Lanes *l, const Grid *g, const Scratch *scratch,
                       const stored *_, vec like) noexcept nogil:
    """The sums of each channel of a chunk about its mean."""
    cdef const stored *x = <const stored *> address(&job.x, whole.n, 0, whole.s)
    cdef const stored *dy = <const stored *> address(&job.dy, whole.n, 0, whole.s)
    cdef Py_ssize_t left
    cdef Span t = whole[0]
    cdef Rows rows
    clear_lanes(job, l, like)
    rows.ahead = 0
    if plain_rows(job, _):
        rows.row = row_of(&job.x, _)
        rows.dyrow = row_of(&job.dy, _)
        rows.rows = t.rows
        rows.lanes = job.C
        add_positions(job, x, dy, &rows, l, 0, like)
    else:
        while t.c < job.C:
            t.s = whole.s
            t.lanes = min(STRIP, job.C - t.c)
            left = whole.rows
            while next_rows(job, &t, left):
                rows_gradient(job, &t, g, scratch, &x, &dy, like)
                rows.rows = t.rows
                rows.lanes = rows.row = rows.dyrow = t.lanes
                add_positions(job, x, dy, &rows, l, t.c, like)
                t.s += t.rows
                left -= t.rows
            t.c += t.lanes
    fold_lanes(job, l)


cdef bint sums_chunk(const Job *job, const Span *whole, const double *known, double *sums, const Scratch *scratch,
                     const stored *_, vec like) noexcept nogil:
    """The sums of the groups that are not known yet, which stand at infinity; returns whether float32 carried all."""
    cdef Lanes l
    cdef Grid grid
    cdef Span t
    cdef Py_ssize_t g, c
    cdef double rest, rstd, largest
    cdef bint ok, all_ok = True
    lane_parameters(job, whole, known, NULL, scratch, &grid, like)
    l.pivot = grid.mean
    l.sum = lane_array(job, scratch, 5)
    l.product = lane_array(job, scratch, 6)
    sum_products(job, whole, &l, &grid, scratch, _, like)
    for g in range(job.G):
        rest = known[PIVOT * job.G + g]
        rest -= in_type(rest, like)
        rstd = rstd_of(job, known, job.G, g)
        largest = 0
        for c in range(g * job.K, (g + 1) * job.K):
            largest = max(largest, abs(l.sum[c])) if l.sum[c] == l.sum[c] and l.product[c] - l.product[c] == 0 else INFINITY
        t = group_of(job, whole, g)
        ok = vec is doubles or (2.0 ** -40 < rstd < 2.0 ** 40 and 2.0 ** -60 < largest < 2.0 ** 60
                                and lane_parameters(job, &t, known, NULL, scratch, &grid, like))
        for c in range(g * job.K, (g + 1) * job.K if ok and sums[g * job.K] == INFINITY else 0):
            sums[c] = l.sum[c]
            sums[job.C + c] = l.product[c] - rest * l.sum[c]
        all_ok &= ok
    return all_ok


cdef void channels_last_sums(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef double *found = task.found
    cdef Unit u = unit_of(job, task.unit)
    cdef Span t = rows_of(job, &u, task.chunk)
    cdef double *sums = found + sums_at(job)
    cdef Py_ssize_t g
    for g in range(job.G):
        sums[g * job.K] = INFINITY
    if not sums_chunk(job, &t, known, sums, scratch, _, like):
        sums_chunk(job, &t, known, sums, scratch, <const double *> NULL, gn_all_doubles(0))


cdef inline bint nothing_counts(const Job *job, const Span *whole, const double *known) noexcept nogil:
    """Whether nothing counts in one of these groups."""
    cdef Py_ssize_t g
    cdef bint none = False
    for g in range(whole.c // job.K, (whole.c + whole.lanes) // job.K):
        none |= known[COUNT * job.G + g] == 0
    return none


cdef void dx_chunk(const Job *job, const Unit *u, const Span *whole, Grid *g, const double *known,
                   const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    cdef const stored *x = <const stored *> address(&job.x, whole.n, 0, whole.s)
    cdef const stored *dy = <const stored *> address(&job.dy, whole.n, 0, whole.s)
    cdef stored *dx = <stored *> address(&job.y, whole.n, 0, whole.s)
    cdef Py_ssize_t left, stop = whole.c + whole.lanes
    cdef bint none = nothing_counts(job, whole, known)
    cdef Span t = whole[0]
    cdef Grid strip
    g.rows = t.rows
    g.lanes = t.lanes
    g.flow.ahead = job.ahead
    g.flow.stream = job.y.streamed and streams(job, dx, job.y.stride[0]) and job.y.data != job.dy.data
    if t.lanes == job.C and plain_rows(job, _) and in_rows(job, &job.y,
                                                           _) and not none and g.flow.stream == job.y.streamed:
        g.xrow = row_of(&job.x, _)
        g.rrow = row_of(&job.dy, _)
        g.yrow = row_of(&job.y, _)
        dx_positions(job, x, dy, dx, g, like)
        return
    g.flow.stream = False
    g.flow.ahead = 0
    while t.c < stop:
        t.lanes = min(TILE, stop - t.c)
        t.s = whole.s
        left = whole.rows
        while left > 0:
            t.rows = min(left, TILE // t.lanes)
            strip = strip_of(g, t.c, like)
            strip.rows = t.rows
            strip.lanes = strip.xrow = strip.rrow = strip.yrow = t.lanes
            rows_gradient(job, &t, g, scratch, &x, &dy, like)
            dx_positions(job, x, dy, <stored *> scratch.y, &strip, like)
            if none or job.mask.data != NULL:
                unmoved(job, u, &t, dy, <stored *> scratch.y, known, scratch)
            move(job, &job.y, &t, <stored *> scratch.y, True)
            if job.dresidual.data != NULL:
                move(job, &job.dresidual, &t, <stored *> dy, True)
            t.s += t.rows
            left -= t.rows
        t.c += t.lanes


cdef void channels_last_dx(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef Unit u = unit_of(job, task.unit)
    cdef Span t = rows_of(job, &u, task.chunk), part
    cdef const double *slopes = known + slopes_at(job)
    cdef Py_ssize_t i
    cdef Grid g
    if lane_parameters(job, &t, known, slopes, scratch, &g, like):
        dx_chunk(job, &u, &t, &g, known, scratch, _, like)
        return
    for i in range(job.G):
        part = group_of(job, &t, i)
        if lane_parameters(job, &part, known, slopes, scratch, &g, like):
            dx_chunk(job, &u, &part, &g, known, scratch, _, like)
        else:
            lane_parameters(job, &part, known, slopes, scratch, &g, gn_all_doubles(0))
            dx_chunk(job, &u, &part, &g, known, scratch, <const double *> NULL, gn_all_doubles(0))

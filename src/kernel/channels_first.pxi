# The walk of channels-first arrays, channel by channel: each has a run of positions, and a scale and a shift of its own. Short
# channels have theirs in short.pxi.

cdef enum:
    STREAMED = 1024  # values of a channel that is streamed from registers; shorter ones are from a tile of several


cdef inline double *rstds(const Job *job, const double *known, const Scratch *scratch) noexcept nogil:
    """Those of a unit's groups, behind their parameters."""
    rstds_of(job, known, job.unit_groups, scratch.channels + 2 * parameters_of(job))
    return scratch.channels + 2 * parameters_of(job)


cdef inline Py_ssize_t parameters_of(const Job *job) noexcept nogil:
    """The size of an array of a unit's parameters, which are computed in whole vectors."""
    return job.K + LANES


cdef struct Part:  # of a unit: some channels of one group, or a piece of one channel
    Py_ssize_t n, g, c, channels, s, values  # sample; group, of the unit; first channel; values of each channel, from s on


cdef inline Part part_of(const Job *job, const Unit *u, Py_ssize_t chunk, Py_ssize_t g) noexcept nogil:
    """What a chunk has of a group."""
    cdef Part p
    cdef Py_ssize_t start, stop
    p.n = u.n
    p.g = g
    p.c = u.c + g * job.K
    p.channels = job.K
    p.s = 0
    p.values = job.S
    if job.chunks > 1:
        bounds(job, chunk, &start, &stop)
        p.c += start // job.S
        p.s = start % job.S
        p.channels = max(1, (stop - start) // job.S)
        p.values = min(stop - start, job.S)
    return p


cdef inline Span span_of(const Part *p) noexcept nogil:
    cdef Span t
    t.n = p.n
    t.c = p.c
    t.s = p.s
    t.rows = 1
    t.lanes = p.channels * p.values
    return t


cdef inline bint in_runs(const Job *job, const View *v, const stored *_) noexcept nogil:
    """Whether each channel's positions lie in a row, in this type, or the array is absent."""
    return v.data == NULL or (v.storage == storage_as(_) and v.ndim == 1 and (v.stride[0] == v.itemsize or job.S == 1))


# ---- moments ---------------------------------------------------------------------------------------


cdef inline bint run_moments(const stored *x, Py_ssize_t n, double *found, Py_ssize_t groups, vec like) noexcept nogil:
    """Of values in a row; returns whether float32 carried them."""
    cdef double sums[2 * LANES]
    cdef double sum, square, pivot = pivot_of(x, n, like)
    if vec is doubles and n < SMALL:
        add_few(x, n, pivot, sums)
    else:
        memset(sums, 0, sizeof(sums))
        add_values(x, <const stored *> NULL, n, all_of(pivot, like), pivot, sums)
    gn_total(sums, &sum, &square)
    put_moments(n, sum, square, pivot, found, groups)
    return vec is doubles or carried(square)


cdef inline void block_moments(const stored *x, Py_ssize_t n, bint few, double *found, Py_ssize_t groups,
                               vec like) noexcept nogil:
    if few or not run_moments(x, n, found, groups, like):
        run_moments(x, n, found, groups, gn_all_doubles(0))


cdef inline void slab_moments(const stored *x, Py_ssize_t n, bint few, double *found, Py_ssize_t groups,
                              vec like) noexcept nogil:
    """Of a slab, or a chunk of one, that lies in a row."""
    cdef double block[4]
    cdef Py_ssize_t i = BLOCK
    block_moments(x, min(n, BLOCK), few, found, groups, like)
    while i < n:
        block_moments(x + i, min(n - i, BLOCK), few, block, 1, like)
        merge_group(found, block, groups, 1)
        i += BLOCK


cdef void gathered_moments(const Job *job, Span t, const Scratch *scratch, double *found, Py_ssize_t groups,
                           const stored *_, vec like) noexcept nogil:
    """Of values that are strided or of which not all count."""
    cdef double block[4]
    cdef Py_ssize_t left = t.lanes, n
    cdef bint few
    cdef stored *tile = <stored *> scratch.x
    while left > 0:
        t.lanes = n = min(left, BLOCK)
        move(job, &job.x, &t, tile, False)
        if job.mask.data != NULL:
            n = pack_values(<const stored *> tile, n, load_mask(job, t, scratch.mask), tile)
        if n > 0:
            few = job.K * job.S < SMALL or (job.mask.data != NULL and n < SMALL)
            block_moments(<const stored *> tile, n, few, block, 1, like)
            merge_group(found, block, groups, 1)
        left -= t.lanes
        forward(job, &t, t.lanes)


cdef void channels_first_moments(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef double *found = task.found
    cdef Unit u = unit_of(job, task.unit)
    cdef Part p = part_of(job, &u, task.chunk, 0)
    cdef Span t = span_of(&p)
    cdef const stored *x = <const stored *> address(&job.x, t.n, t.c, t.s)
    cdef Py_ssize_t values = t.lanes, g
    cdef bint in_a_row
    t.lanes = values * u.groups
    in_a_row = job.mask.data == NULL and in_one_run(job, &job.x, &t)
    t.lanes = values
    for g in range(u.groups):
        if in_a_row:
            slab_moments(x + g * values, values, job.K * job.S < SMALL, found + g, u.groups, like)
        else:
            gathered_moments(job, t, scratch, found + g, u.groups, _, like)
        t.c += job.K


# ---- parameters ------------------------------------------------------------------------------------


cdef inline void read_channels(const View *v, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, double absent,
                               double *to) noexcept nogil:
    cdef const void *p = v.data + n * v.sample_stride + c * v.itemsize
    cdef Py_ssize_t i
    if v.data == NULL:
        for i in range(channels):
            to[i] = absent
    elif v.storage == FLOAT32:
        for i in range(channels):
            to[i] = (<const float *> p)[i]
    else:
        for i in range(channels):
            to[i] = (<const double *> p)[i]


cdef inline bint comfortable(double v) noexcept nogil:
    """Whether float32 may carry a factor: within 2^-100 and 2^100, so that no product with a value that matters leaves its range;
    or 0, or NaN. What is not is computed in float64 from load to store."""
    return not (abs(v) > 2.0 ** 100 or (abs(v) < 2.0 ** -100 and v != 0))


cdef inline doubles parameters_at(const View *v, const char *p, Py_ssize_t i, Py_ssize_t n,
                                  doubles absent) noexcept nogil:
    """A weight or bias of n channels from the i-th on, and zeros."""
    if v.data == NULL:
        return absent
    elif v.storage == FLOAT32:
        return some_of(<const float *> p + i, n, absent)
    return some_of(<const double *> p + i, n, absent)


cdef bint channel_parameters(const Job *job, const Part *p, double rstd, double rest, double *scale,
                             double *shift) noexcept nogil:
    """Scale and shift of channels of one group, DOUBLES at a time (there is room for more), and whether float32 may carry them."""
    cdef const char *weights = job.weight.data + p.n * job.weight.sample_stride + p.c * job.weight.itemsize
    cdef const char *biases = job.bias.data + p.n * job.bias.sample_stride + p.c * job.bias.itemsize
    cdef doubles zero = gn_all_doubles(0), one = gn_all_doubles(1), s, size, largest = one, smallest = one
    cdef Py_ssize_t k, i = 0, n
    for k in range((p.channels + DOUBLES - 1) // DOUBLES):
        n = min(DOUBLES, p.channels - i)
        s = parameters_at(&job.weight, weights, i, n, one) * gn_all_doubles(rstd)
        size = absolute(s)
        largest = most(size, largest)
        smallest = least(where_at_most(size, zero, one, size), smallest)
        gn_doubles_to_double(scale + i, s, False)
        if shift != NULL:  # an infinite weight makes no NaN of its own
            s = where_at_most(size, gn_all_doubles(1e300), s, zero)
            gn_doubles_to_double(shift + i, parameters_at(&job.bias, biases, i, n, zero) - gn_all_doubles(rest) * s,
                                 False)
        i += DOUBLES
    return not (gn_any_less(gn_all_doubles(2.0 ** 100), largest) or gn_any_less(smallest, gn_all_doubles(2.0 ** -100)))


cdef inline Py_ssize_t steps_of(const View *v, const stored *_) noexcept nogil:
    return v.channel_stride // <Py_ssize_t> sizeof(stored)


# ---- y ---------------------------------------------------------------------------------------------


cdef inline bint runs_directly(const Job *job, const Part *p, const View *v, const stored *_) noexcept nogil:
    """Whether channels are worked on where they lie: streamed ones are long, as each ends within a line."""
    return (in_runs(job, &job.x, _) and in_runs(job, v, _) and in_runs(job, &job.y, _)
            and (not job.y.streamed or (p.values >= STREAMED and job.x.data != job.y.data and v.data != job.y.data)))


cdef inline void set_runs(const Job *job, const Part *p, Runs *runs, const View *v, const stored *_) noexcept nogil:
    runs.channels = p.channels
    runs.values = p.values
    runs.xstep = steps_of(&job.x, _)
    runs.rstep = steps_of(v, _)
    runs.ystep = steps_of(&job.y, _)
    runs.flow.stream = job.y.streamed and p.values >= STREAMED
    runs.flow.ahead = job.ahead


cdef inline Py_ssize_t whole_lines(Py_ssize_t values, Py_ssize_t itemsize) noexcept nogil:
    """How many channels make a tile: if it can be, such that tiles end with a line of memory, as half a line streamed takes as long
    as some whole ones (30 ns; 512 x 256 x 14 x 14 took 1.4 times as long)."""
    cdef Py_ssize_t most = max(1, TILE // values), channels = most
    while channels > 1 and channels * values * itemsize % 64:
        channels -= 1
    return channels if channels > 1 else most


cdef inline bint next_channels(const Job *job, const Part *p, Span *t, Runs *runs) noexcept nogil:
    """The next tile: so many whole channels, or a part of a channel, and its place in the parameters of the part."""
    if runs.values == 0:  # the first
        t.c = p.c
        t.s = p.s
    elif t.s + runs.values < p.s + p.values:
        t.s += runs.values
    else:
        t.c += runs.channels
        t.s = p.s
        runs.scale += runs.channels
        runs.shift += runs.channels
    runs.channels = min(whole_lines(p.values, job.y.itemsize), p.c + p.channels - t.c)
    runs.values = min(TILE, p.s + p.values - t.s)
    runs.xstep = runs.rstep = runs.ystep = runs.values
    runs.flow.stream = False
    runs.flow.ahead = 0
    t.lanes = runs.channels * runs.values
    return t.c < p.c + p.channels


cdef void affine_part(const Job *job, const Part *p, Runs *runs, const Scratch *scratch, const stored *_,
                      vec like) noexcept nogil:
    """y of some channels, where they lie or tile by tile."""
    cdef const stored *x = <const stored *> address(&job.x, p.n, p.c, p.s)
    cdef const stored *residual = NULL
    cdef stored *y = <stored *> address(&job.y, p.n, p.c, p.s)
    cdef Py_ssize_t row
    cdef Span t = span_of(p)
    if job.residual.data != NULL:
        residual = <const stored *> address(&job.residual, p.n, p.c, p.s)
    if runs_directly(job, p, &job.residual, _):
        set_runs(job, p, runs, &job.residual, _)
        affine_runs(x, residual, y, runs, job.activation, like)
        return
    runs.values = 0
    while next_channels(job, p, &t, runs):
        x = load_tile(job, &job.x, &t, <stored *> scratch.x, &row)
        if residual != NULL:
            residual = load_tile(job, &job.residual, &t, <stored *> scratch.y, &row)
        y = target(job, &job.y, &t, <stored *> scratch.y)
        runs.flow.ahead = job.ahead if x != scratch.x else 0
        affine_runs(x, residual, y, runs, job.activation, like)
        if y == <stored *> scratch.y:
            move(job, &job.y, &t, y, True)


cdef void channels_first_affine(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef Unit u = unit_of(job, task.unit)
    cdef Part p
    cdef Runs runs
    cdef double mean, rstd
    cdef double *each_rstd = rstds(job, known, scratch)
    cdef Py_ssize_t g
    for g in range(u.groups):
        p = part_of(job, &u, task.chunk, g)
        mean = known[PIVOT * u.groups + g]
        rstd = each_rstd[g]
        runs.mean = in_type(mean, like)
        runs.scale = scratch.channels
        runs.shift = scratch.channels + parameters_of(job)
        if channel_parameters(job, &p, rstd, mean - runs.mean, scratch.channels,
                              scratch.channels + parameters_of(job)) and comfortable(mean):
            affine_part(job, &p, &runs, scratch, _, like)
        else:
            channel_parameters(job, &p, rstd, 0, scratch.channels, scratch.channels + parameters_of(job))
            runs.mean = mean
            affine_part(job, &p, &runs, scratch, <const double *> NULL, gn_all_doubles(0))


# ---- the gradient ----------------------------------------------------------------------------------


cdef inline bint plain_gradient(const Job *job, const stored *_) noexcept nogil:
    """Whether x and dy can be read where they lie."""
    return (job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL
            and in_runs(job, &job.x, _) and in_runs(job, &job.dy, _))


cdef void gradient_tile(const Job *job, const Span *t, const void *z, const Scratch *scratch, const stored **x,
                        const stored **dy, vec like) noexcept nogil:
    """dy' = dy * act'(z) in a tile, in the order of rows. A masked position whose dy' is 0 has an x of 0 then: whatever it was, it
    contributes nothing."""
    cdef stored *to = <stored *> scratch.dy
    cdef stored *clean = <stored *> scratch.x
    cdef const uint8_t *mask = NULL
    cdef Py_ssize_t positions = t.rows if job.channels_last else t.lanes, lanes = t.lanes if job.channels_last else 1, i, j
    move(job, &job.dy, t, to, False)
    if job.mask.data != NULL:
        mask = load_mask(job, t[0], scratch.mask)
        move(job, &job.x, t, clean, False)
        x[0] = clean
        if job.activation != IDENTITY:
            for i in range(positions):
                for j in range(i * lanes, (i + 1) * lanes if mask[i] == 0 else 0):
                    if scalar(to[j]) == 0:
                        put_zero(<stored *> z + j)
    if job.activation != IDENTITY:
        activate_gradient(job.activation, z, to, t.rows * t.lanes, like)
    if job.mask.data != NULL:
        for i in range(positions):
            for j in range(i * lanes, (i + 1) * lanes if mask[i] == 0 else 0):
                if scalar(to[j]) == 0:
                    put_zero(clean + j)
    dy[0] = to


cdef inline void put_zero(stored *p) noexcept nogil:
    memset(p, 0, sizeof(stored))


cdef void run_gradient(const Job *job, const Span *t, const Runs *runs, const Scratch *scratch, const stored **x,
                       const stored **dy, vec like) noexcept nogil:
    """x and dy' of a tile."""
    cdef const stored *residual = NULL
    cdef Py_ssize_t row
    x[0] = load_tile(job, &job.x, t, <stored *> scratch.x, &row)
    if job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL:
        dy[0] = load_tile(job, &job.dy, t, <stored *> scratch.dy, &row)
        return
    if job.activation != IDENTITY:
        if job.residual.data != NULL:
            residual = load_tile(job, &job.residual, t, <stored *> scratch.y, &row)
        affine_runs(x[0], residual, <stored *> scratch.y, runs, IDENTITY, like)
    gradient_tile(job, t, scratch.y, scratch, x, dy, like)


cdef bint centre_sums(Py_ssize_t channels, double rest, double *sum, double *product) noexcept nogil:
    """Bring the products of one group's channels to their mean, of which `rest` was left out; returns whether float32 carried them."""
    cdef double largest = 0, none = 0
    cdef Py_ssize_t c
    for c in range(channels):
        product[c] -= rest * sum[c]
        largest = max(largest, abs(sum[c]))
        none += (sum[c] - sum[c]) + (product[c] - product[c])
    return none == 0 and 2.0 ** -60 < largest < 2.0 ** 60


cdef void sums_part(const Job *job, const Part *p, Runs *runs, double *sum, double *product, const Scratch *scratch,
                    const stored *_, vec like) noexcept nogil:
    """The sums of some channels."""
    cdef double lanes[2 * LANES]
    cdef vec mean = all_of(runs.mean, like)
    cdef const stored *x = <const stored *> address(&job.x, p.n, p.c, p.s)
    cdef const stored *dy = <const stored *> address(&job.dy, p.n, p.c, p.s)
    cdef Py_ssize_t c, i
    cdef Span t = span_of(p)
    if plain_gradient(job, _):
        for c in range(p.channels):
            sum_channel(x, dy, p.values, mean, runs.mean, sum + c, product + c)
            x += steps_of(&job.x, _)
            dy += steps_of(&job.dy, _)
        return
    memset(lanes, 0, sizeof(lanes))
    runs.values = 0
    while next_channels(job, p, &t, runs):
        run_gradient(job, &t, runs, scratch, &x, &dy, like)
        c = t.c - p.c
        if runs.values < p.values:  # a part of a channel
            add_values(x, dy, runs.values, mean, runs.mean, lanes)
            gn_total(lanes, sum + c, product + c)
            if t.s + runs.values == p.s + p.values:
                memset(lanes, 0, sizeof(lanes))
        else:
            for i in range(runs.channels):
                sum_channel(x + i * runs.values, dy + i * runs.values, runs.values, mean, runs.mean, sum + c + i,
                            product + c + i)


cdef void channels_first_sums(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef double *found = task.found
    cdef Unit u = unit_of(job, task.unit)
    cdef Part p
    cdef Runs runs
    cdef double mean, rstd
    cdef double *sums
    cdef double *each_rstd = rstds(job, known, scratch)
    cdef Py_ssize_t g
    cdef bint ok
    runs.xstep = runs.rstep = runs.ystep = 0
    runs.flow.stream = False
    runs.flow.ahead = 0
    for g in range(u.groups):
        p = part_of(job, &u, task.chunk, g)
        mean = known[PIVOT * u.groups + g]
        rstd = each_rstd[g]
        runs.mean = in_type(mean, like)
        runs.scale = scratch.channels
        runs.shift = scratch.channels + parameters_of(job)
        sums = found + sums_at(job) + p.c - u.c
        ok = vec is doubles or (2.0 ** -40 < rstd < 2.0 ** 40 and comfortable(mean))
        if ok and job.activation != IDENTITY:
            ok = channel_parameters(job, &p, rstd, mean - runs.mean, scratch.channels,
                                    scratch.channels + parameters_of(job))
        if ok:
            sums_part(job, &p, &runs, sums, sums + u.channels, scratch, _, like)
            ok = centre_sums(p.channels, mean - runs.mean, sums, sums + u.channels) or vec is doubles
        if not ok:
            runs.mean = mean
            runs.scale = scratch.channels
            runs.shift = scratch.channels + parameters_of(job)
            channel_parameters(job, &p, rstd, 0, scratch.channels, scratch.channels + parameters_of(job))
            sums_part(job, &p, &runs, sums, sums + u.channels, scratch, <const double *> NULL, gn_all_doubles(0))


cdef void settle_sums(const Job *job, Py_ssize_t unit, double *known, const Scratch *scratch) noexcept nogil:
    """From a unit's sums: its shares of dweight and dbias, and a and b of its groups."""
    cdef Unit u = unit_of(job, unit)
    cdef double *slopes = known + slopes_at(job)
    cdef double *sums = known + sums_at(job)
    cdef double *weight = scratch.channels
    cdef double *dbias = job.dbias + u.n // job.block * job.C + u.c
    cdef double *dweight = job.dweight + u.n // job.block * job.C + u.c
    cdef double rstd, count, a, b
    cdef Py_ssize_t g, i
    for g in range(u.groups):
        rstd = rstd_of(job, known, u.groups, g)
        count = known[COUNT * u.groups + g]
        if job.S >= SHORT or job.channels_last:
            read_channels(&job.weight, u.n, u.c + g * job.K, job.K, 1, weight)
            a = b = 0
            for i in range(job.K):
                dbias[i] += sums[i]
                dweight[i] += sums[u.channels + i] * rstd
                a += weight[i] * sums[i]
                b += weight[i] * (sums[u.channels + i] * rstd)
            slopes[2 * g] = a
            slopes[2 * g + 1] = b
            sums += job.K
            dbias += job.K
            dweight += job.K
        slopes[2 * g] = slopes[2 * g] / count if count > 0 else 0
        slopes[2 * g + 1] = slopes[2 * g + 1] / count if count > 0 else 0


cdef void add_sums(const Job *job, double *into, const double *other) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(sums_at(job), slopes_at(job) + 2 * job.unit_groups):
        into[i] += other[i]


cdef void unmoved(const Job *job, const Unit *u, const Span *t, const stored *dy, stored *dx, const double *known,
                  const Scratch *scratch) noexcept nogil:
    """dx where no statistics were moved, as a position did not count or nothing did."""
    cdef const uint8_t *mask = NULL
    cdef Py_ssize_t lanes = t.lanes if job.channels_last else 1, positions = t.rows * t.lanes // lanes, i, j, c = -1, g, now
    cdef double scale = 0
    cdef bint none = False
    if job.mask.data != NULL:
        mask = load_mask(job, t[0], scratch.mask)
    for j in range(lanes):
        for i in range(positions):
            now = t.c + (j if job.channels_last else (t.s + i) // job.S)
            if now != c:
                c = now
                g = c // job.K - u.first
                read_channels(&job.weight, t.n, c, 1, 1, &scale)
                scale *= rstd_of(job, known, u.groups, g)
                none = known[COUNT * u.groups + g] == 0
            if none or (mask != NULL and mask[i] == 0):
                if stored is double or stored is float:
                    dx[i * lanes + j] = <stored> (dy[i * lanes + j] * scale)


cdef void dx_part(const Job *job, const Unit *u, const Part *p, Runs *runs, const double *known,
                  const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    """dx of some channels, where they lie or tile by tile."""
    cdef const stored *x = <const stored *> address(&job.x, p.n, p.c, p.s)
    cdef const stored *dy = <const stored *> address(&job.dy, p.n, p.c, p.s)
    cdef stored *dx = <stored *> address(&job.y, p.n, p.c, p.s)
    cdef bint none = known[COUNT * u.groups + p.g] == 0
    cdef Span t = span_of(p)
    if plain_gradient(job, _) and runs_directly(job, p, &job.dy, _) and not none:
        set_runs(job, p, runs, &job.dy, _)
        dx_runs(x, dy, dx, runs, like)
        return
    runs.values = 0
    while next_channels(job, p, &t, runs):
        run_gradient(job, &t, runs, scratch, &x, &dy, like)
        dx = target(job, &job.y, &t, <stored *> scratch.y)
        dx_runs(x, dy, dx, runs, like)
        if none or job.mask.data != NULL:
            unmoved(job, u, &t, dy, dx, known, scratch)
        if dx == <stored *> scratch.y:
            move(job, &job.y, &t, dx, True)
        if job.dresidual.data != NULL:
            move(job, &job.dresidual, &t, <stored *> dy, True)


cdef void channels_first_dx(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const Scratch *scratch = task.scratch
    cdef const double *known = task.known
    cdef Unit u = unit_of(job, task.unit)
    cdef const double *slopes = known + slopes_at(job)
    cdef double *shift
    cdef double *each_rstd = rstds(job, known, scratch)
    cdef double mean, rstd
    cdef Part p
    cdef Runs runs
    cdef Py_ssize_t g
    cdef bint none
    for g in range(u.groups):
        p = part_of(job, &u, task.chunk, g)
        mean = known[PIVOT * u.groups + g]
        rstd = each_rstd[g]
        none = known[COUNT * u.groups + g] == 0
        runs.mean = in_type(mean, like)
        runs.slope = rstd * rstd * slopes[2 * g + 1]
        runs.constant = rstd * slopes[2 * g] - runs.slope * (mean - runs.mean)
        shift = NULL if job.activation == IDENTITY else scratch.channels + parameters_of(job)
        runs.scale = scratch.channels
        runs.shift = scratch.channels + parameters_of(job)
        if (not none and channel_parameters(job, &p, rstd, mean - runs.mean, scratch.channels, shift)
                and (vec is doubles or (2.0 ** -40 < rstd < 2.0 ** 40 and abs(runs.slope) < 2.0 ** 100 and comfortable(mean)))):
            dx_part(job, &u, &p, &runs, known, scratch, _, like)
        else:
            runs.mean = mean
            runs.constant = rstd * slopes[2 * g]
            channel_parameters(job, &p, rstd, 0, scratch.channels, shift)
            dx_part(job, &u, &p, &runs, known, scratch, <const double *> NULL, gn_all_doubles(0))

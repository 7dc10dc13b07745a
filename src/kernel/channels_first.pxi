# The walk of channels-first arrays, channel by channel: each has a run of positions, and a scale and a shift of its own. Short
# channels have theirs in short.pxi.


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
    memset(sums, 0, sizeof(sums))
    add_values(x, <const stored *> NULL, n, all_of(pivot, like), pivot, sums)
    gn_total(sums, &sum, &square)
    put_moments(n, sum, square, pivot, found, groups)
    return vec is doubles or carried(square)


cdef Py_ssize_t sample(const Job *job, Span t, const Scratch *scratch, stored *tile) noexcept nogil:
    """Gather the values that pivot_of would take, or those of them that count; returns how many they are."""
    cdef Py_ssize_t n = t.lanes, stride = n // SAMPLES, count = 0, r, row
    cdef const stored *x
    cdef Span whole = t
    for r in range(SAMPLES if stride >= LANES else 1):
        t = whole
        forward(job, &t, r * stride)
        t.lanes = LANES if stride >= LANES else n
        x = load_tile(job, &job.x, &t, tile + count, &row)
        if job.mask.data != NULL:
            count += pack_values(x, t.lanes, load_mask(job, t, scratch.mask), tile + count)
        else:
            memmove(tile + count, x, t.lanes * sizeof(stored))
            count += t.lanes
    return count


cdef bint tiled_moments(const Job *job, Span t, const Scratch *scratch, double *found, Py_ssize_t groups, const stored *_, vec like) noexcept nogil:
    """Of values that are strided or of which not all count."""
    cdef double sums[2 * LANES]
    cdef double sum, square, pivot = 0
    cdef stored *tile = <stored *> scratch.x
    cdef Py_ssize_t left = t.lanes, count = 0, n, row, samples = sample(job, t, scratch, tile)
    cdef const stored *x
    if samples == SAMPLES * LANES:
        pivot = pivot_of(<const stored *> tile, samples, like)
    elif samples > 0:
        pivot = pivot_of_few(<const stored *> tile, samples, like)
    memset(sums, 0, sizeof(sums))
    while left > 0:
        t.lanes = n = min(left, TILE)
        x = load_tile(job, &job.x, &t, tile, &row)
        if job.mask.data != NULL:
            n = pack_values(x, n, load_mask(job, t, scratch.mask), tile)
            x = tile
        if n > 0:
            if samples == 0 or (vec is doubles and stored is not double and count == 0):
                pivot = scalar(x[0])
                samples = 1
            add_values(x, <const stored *> NULL, n, all_of(pivot, like), pivot, sums)
            count += n
        left -= t.lanes
        forward(job, &t, t.lanes)
    gn_total(sums, &sum, &square)
    put_moments(count, sum, square, pivot, found, groups)
    return vec is doubles or carried(square) or count == 0


cdef void channels_first_moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *found, const Scratch *scratch,
                                 const stored *_, vec like) noexcept nogil:
    cdef doubles wide = gn_all_doubles(0)
    cdef Unit u = unit_of(job, unit)
    cdef Part p = part_of(job, &u, chunk, 0)
    cdef Span t = span_of(&p)
    cdef Py_ssize_t values = t.lanes, g
    cdef bint few = job.K * job.S < SMALL, whole
    t.lanes = values * u.groups
    whole = job.mask.data == NULL and job.x.storage == storage_as(_) and in_one_run(job, &job.x, &t)
    cdef const stored *x = <const stored *> address(&job.x, t.n, t.c, t.s)
    t.lanes = values
    for g in range(u.groups):
        if whole and few:
            run_moments(x, values, found + g, u.groups, wide)
        elif whole:
            if not run_moments(x, values, found + g, u.groups, like):
                run_moments(x, values, found + g, u.groups, wide)
        else:
            if job.mask.data != NULL:
                few = counted(job, t, SMALL, scratch.mask) < SMALL
            if few or not tiled_moments(job, t, scratch, found + g, u.groups, _, like):
                tiled_moments(job, t, scratch, found + g, u.groups, _, wide)
        x += values
        t.c += job.K


# ---- parameters ------------------------------------------------------------------------------------


cdef inline void read_channels(const View *v, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, double absent, double *to) noexcept nogil:
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
    return not (abs(v) > 1.2676506002282294e30 or (abs(v) < 7.888609052210118e-31 and v != 0))


cdef inline bint channel_parameters(const Job *job, const Part *p, double rstd, double rest, double *scale, double *shift) noexcept nogil:
    """Scale and shift of channels of one group, and whether float32 may carry them."""
    cdef Py_ssize_t i
    cdef bint ok = True
    read_channels(&job.weight, p.n, p.c, p.channels, 1, scale)
    for i in range(p.channels):
        scale[i] *= rstd
        ok &= comfortable(scale[i])
    if shift != NULL:
        read_channels(&job.bias, p.n, p.c, p.channels, 0, shift)
        for i in range(p.channels):  # an infinite weight makes no NaN of its own
            shift[i] -= rest * (scale[i] if scale[i] - scale[i] == 0 else 0)
    return ok


cdef inline Py_ssize_t steps_of(const View *v, const stored *_) noexcept nogil:
    return v.channel_stride // <Py_ssize_t> sizeof(stored)


# ---- y ---------------------------------------------------------------------------------------------


cdef void affine_part(const Job *job, const Part *p, Runs *runs, const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    """y of some channels, where they lie or tile by tile."""
    cdef const stored *x = <const stored *> address(&job.x, p.n, p.c, p.s)
    cdef const stored *residual = NULL
    cdef stored *y = <stored *> address(&job.y, p.n, p.c, p.s)
    cdef Py_ssize_t c, i, row
    cdef Span t = span_of(p)
    if job.residual.data != NULL:
        residual = <const stored *> address(&job.residual, p.n, p.c, p.s)
    if in_runs(job, &job.x, _) and in_runs(job, &job.residual, _) and in_runs(job, &job.y, _):
        runs.channels = p.channels
        runs.values = p.values
        runs.xstep = steps_of(&job.x, _)
        runs.rstep = steps_of(&job.residual, _)
        runs.ystep = steps_of(&job.y, _)
        runs.flow.stream = job.y.streamed and x != y and residual != y and p.values >= 4 * LANES
        runs.flow.ahead = job.ahead
        affine_runs(x, residual, y, runs, job.activation, like)
        return
    runs.channels = 1
    runs.flow.stream = False
    runs.flow.ahead = 0
    for c in range(p.channels):
        for i from 0 <= i < p.values by TILE:
            t.c = p.c + c
            t.s = p.s + i
            t.lanes = runs.values = min(TILE, p.values - i)
            x = load_tile(job, &job.x, &t, <stored *> scratch.x, &row)
            if residual != NULL:
                residual = load_tile(job, &job.residual, &t, <stored *> scratch.y, &row)
            y = direct(job, &job.y, &t, <stored *> scratch.y, &row)
            affine_runs(x, residual, y, runs, job.activation, like)
            if y == <stored *> scratch.y:
                move(job, &job.y, &t, y, True)
        runs.scale += 1
        runs.shift += 1


cdef void channels_first_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, const Scratch *scratch,
                                const stored *_, vec like) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef Part p
    cdef Runs runs
    cdef double mean, rstd
    cdef Py_ssize_t g
    for g in range(u.groups):
        p = part_of(job, &u, chunk, g)
        mean = known[PIVOT * u.groups + g]
        rstd = rstd_of(job, known, u.groups, g)
        runs.mean = in_type(mean, like)
        runs.scale = scratch.channels
        runs.shift = scratch.channels + p.channels
        if channel_parameters(job, &p, rstd, mean - runs.mean, scratch.channels, scratch.channels + p.channels) and comfortable(mean):
            affine_part(job, &p, &runs, scratch, _, like)
        else:
            channel_parameters(job, &p, rstd, 0, scratch.channels, scratch.channels + p.channels)
            runs.mean = mean
            affine_part(job, &p, &runs, scratch, <const double *> NULL, gn_all_doubles(0))


# ---- the gradient ----------------------------------------------------------------------------------


cdef inline bint plain_gradient(const Job *job, const stored *_) noexcept nogil:
    """Whether x and dy can be read where they lie."""
    return (job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL
            and in_runs(job, &job.x, _) and in_runs(job, &job.dy, _))


cdef void gradient_tile(const Job *job, const Span *t, const void *z, const Scratch *scratch, const stored **x, const stored **dy, vec like) noexcept nogil:
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


cdef void run_gradient(const Job *job, const Span *t, const Runs *runs, Py_ssize_t c, const Scratch *scratch,
                       const stored **x, const stored **dy, vec like) noexcept nogil:
    """x and dy' of a part of one channel."""
    cdef const stored *residual = NULL
    cdef Py_ssize_t row
    cdef Runs one = runs[0]
    x[0] = load_tile(job, &job.x, t, <stored *> scratch.x, &row)
    if job.activation != IDENTITY:
        if job.residual.data != NULL:
            residual = load_tile(job, &job.residual, t, <stored *> scratch.y, &row)
        one.channels = 1
        one.values = t.lanes
        one.scale = runs.scale + c
        one.shift = runs.shift + c
        affine_runs(x[0], residual, <stored *> scratch.y, &one, IDENTITY, like)
    gradient_tile(job, t, scratch.y, scratch, x, dy, like)


cdef bint sums_part(const Job *job, const Part *p, const Runs *runs, double rest, double *sums, Py_ssize_t channels,
                    const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    """The sums of some channels, and whether float32 carried them."""
    cdef double lanes[2 * LANES]
    cdef double sum, product, largest = 0
    cdef vec mean = all_of(runs.mean, like)
    cdef bint plain = plain_gradient(job, _)
    cdef const stored *x = <const stored *> address(&job.x, p.n, p.c, p.s)
    cdef const stored *dy = <const stored *> address(&job.dy, p.n, p.c, p.s)
    cdef Py_ssize_t c, i
    cdef Span t = span_of(p)
    for c in range(p.channels):
        memset(lanes, 0, sizeof(lanes))
        if plain:
            add_values(x, dy, p.values, mean, runs.mean, lanes)
            x += steps_of(&job.x, _)
            dy += steps_of(&job.dy, _)
        else:
            t.c = p.c + c
            for i from 0 <= i < p.values by TILE:
                t.s = p.s + i
                t.lanes = min(TILE, p.values - i)
                run_gradient(job, &t, runs, c, scratch, &x, &dy, like)
                add_values(x, dy, t.lanes, mean, runs.mean, lanes)
        gn_total(lanes, &sum, &product)
        sums[c] = sum
        sums[channels + c] = product - rest * sum
        largest = max(largest, abs(sum)) if sum == sum and product - product == 0 else INFINITY
    return vec is doubles or (2.0 ** -60 < largest < 2.0 ** 60)


cdef void channels_first_sums(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, double *found, const Scratch *scratch,
                              const stored *_, vec like) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef Part p
    cdef Runs runs
    cdef double mean, rstd
    cdef double *sums
    cdef Py_ssize_t g
    cdef bint ok
    runs.xstep = runs.rstep = runs.ystep = 0
    runs.flow.stream = False
    runs.flow.ahead = 0
    for g in range(u.groups):
        p = part_of(job, &u, chunk, g)
        mean = known[PIVOT * u.groups + g]
        rstd = rstd_of(job, known, u.groups, g)
        runs.mean = in_type(mean, like)
        runs.scale = scratch.channels
        runs.shift = scratch.channels + p.channels
        sums = found + sums_at(job) + p.c - u.c
        ok = vec is doubles or (2.0 ** -40 < rstd < 2.0 ** 40 and comfortable(mean))
        if ok and job.activation != IDENTITY:
            ok = channel_parameters(job, &p, rstd, mean - runs.mean, scratch.channels, scratch.channels + p.channels)
        if not (ok and sums_part(job, &p, &runs, mean - runs.mean, sums, u.channels, scratch, _, like)):
            runs.mean = mean
            channel_parameters(job, &p, rstd, 0, scratch.channels, scratch.channels + p.channels)
            sums_part(job, &p, &runs, 0, sums, u.channels, scratch, <const double *> NULL, gn_all_doubles(0))


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


cdef void unmoved(const Job *job, const Unit *u, const Span *t, const stored *dy, stored *dx, const double *known, const Scratch *scratch) noexcept nogil:
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


cdef void dx_part(const Job *job, const Unit *u, const Part *p, Runs *runs, const double *known, const Scratch *scratch, const stored *_, vec like) noexcept nogil:
    """dx of some channels, where they lie or tile by tile."""
    cdef const stored *x = <const stored *> address(&job.x, p.n, p.c, p.s)
    cdef const stored *dy = <const stored *> address(&job.dy, p.n, p.c, p.s)
    cdef stored *dx = <stored *> address(&job.y, p.n, p.c, p.s)
    cdef Py_ssize_t c, i, row
    cdef Span t = span_of(p)
    cdef Runs one
    cdef bint none = known[COUNT * u.groups + p.g] == 0
    if plain_gradient(job, _) and in_runs(job, &job.y, _) and not none:
        runs.channels = p.channels
        runs.values = p.values
        runs.xstep = steps_of(&job.x, _)
        runs.rstep = steps_of(&job.dy, _)
        runs.ystep = steps_of(&job.y, _)
        runs.flow.stream = job.y.streamed and dx != x and dx != dy and p.values >= 4 * LANES
        runs.flow.ahead = job.ahead
        dx_runs(x, dy, dx, runs, like)
        return
    runs.xstep = runs.rstep = runs.ystep = 0
    runs.flow.stream = False
    runs.flow.ahead = 0
    one = runs[0]
    one.channels = 1
    for c in range(p.channels):
        one.scale = runs.scale + c
        for i from 0 <= i < p.values by TILE:
            t.c = p.c + c
            t.s = p.s + i
            t.lanes = one.values = min(TILE, p.values - i)
            run_gradient(job, &t, runs, c, scratch, &x, &dy, like)
            dx = direct(job, &job.y, &t, <stored *> scratch.y, &row)
            dx_runs(x, dy, dx, &one, like)
            if none or job.mask.data != NULL:
                unmoved(job, u, &t, dy, dx, known, scratch)
            if dx == <stored *> scratch.y:
                move(job, &job.y, &t, dx, True)
            if job.dresidual.data != NULL:
                move(job, &job.dresidual, &t, <stored *> dy, True)


cdef void channels_first_dx(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, const Scratch *scratch,
                            const stored *_, vec like) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef const double *slopes = known + slopes_at(job)
    cdef double *shift
    cdef double mean, rstd
    cdef Part p
    cdef Runs runs
    cdef Py_ssize_t g
    cdef bint none
    for g in range(u.groups):
        p = part_of(job, &u, chunk, g)
        mean = known[PIVOT * u.groups + g]
        rstd = rstd_of(job, known, u.groups, g)
        none = known[COUNT * u.groups + g] == 0
        runs.mean = in_type(mean, like)
        runs.slope = rstd * rstd * slopes[2 * g + 1]
        runs.constant = rstd * slopes[2 * g] - runs.slope * (mean - runs.mean)
        shift = NULL if job.activation == IDENTITY else scratch.channels + p.channels
        runs.scale = scratch.channels
        runs.shift = scratch.channels + p.channels
        if (not none and channel_parameters(job, &p, rstd, mean - runs.mean, scratch.channels, shift)
                and (vec is doubles or (2.0 ** -40 < rstd < 2.0 ** 40 and abs(runs.slope) < 2.0 ** 100 and comfortable(mean)))):
            dx_part(job, &u, &p, &runs, known, scratch, _, like)
        else:
            runs.mean = mean
            runs.constant = rstd * slopes[2 * g]
            channel_parameters(job, &p, rstd, 0, scratch.channels, shift)
            dx_part(job, &u, &p, &runs, known, scratch, <const double *> NULL, gn_all_doubles(0))

# The walk of channels-first arrays, channel by channel: each has a run of positions, and a scale and a shift of its
# own. Short channels have theirs in short.pxi.

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
    cdef double sum, square, rest, near = 0, pivot = pivot_of(x, n, like)
    cdef Py_ssize_t k
    if vec is doubles and n < SMALL:
        add_few(x, n, pivot, sums)
    else:
        memset(sums, 0, sizeof(sums))
        add_values(x, <const stored *> NULL, n, all_of(pivot, like), pivot, sums)
    gn_total(sums, &sum, &square)
    if stored is double:  # bring the sums of the lanes near 0, exactly, and add them up again
        near = settled(sum / n, sqrt(square / n), like)
        for k in range(LANES):
            sums[k] -= near * (n // LANES + (k < n % LANES))
        gn_total(sums, &rest, &square)
        square -= near * (sum + rest)
        sum = rest
    put_moments(n, sum, square, pivot, near, found, groups)
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
        read_tile(job, &job.x, &t, tile)
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


cdef inline bint comfortable(double v) noexcept nogil:
    """Whether float32 may carry a factor: within 2^-100 and 2^100, so that no product with a value that matters leaves
    its range; or 0, or NaN. What is not is computed in float64 from load to store."""
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
    """Scale and shift of channels of one group, DOUBLES at a time (there is room for more), and whether float32 may
    carry them."""
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


cdef inline bint sums_carried(double rstd, double mean) noexcept nogil:
    """Whether float32 may carry a group's gradient: its squares of rstd, too."""
    return 2.0 ** -40 < rstd < 2.0 ** 40 and comfortable(mean)


cdef inline bint group_parameters(const Task *task, const Part *p, double rstd, const double *slopes, Runs *runs,
                           vec like) noexcept nogil:
    """The parameters of channels of one group, and whether they are carried. Without slopes, those of y only."""
    cdef const Job *job = task.job
    cdef double mean = task.known[PIVOT * job.unit_groups + p.g], rest
    cdef double *shift = task.scratch.channels + parameters_of(job)
    cdef bint ok
    runs.mean = in_type(mean, like)
    rest = rest_of(mean, like)
    runs.scale = task.scratch.channels
    runs.shift = shift
    runs.leak = job.leak
    ok = channel_parameters(job, p, rstd, rest, task.scratch.channels,
                            NULL if slopes != NULL and job.activation == IDENTITY else shift)
    if slopes != NULL:
        runs.slope = rstd * rstd * slopes[2 * p.g + 1]
        runs.constant = rstd * slopes[2 * p.g] - runs.slope * rest
        ok &= sums_carried(rstd, mean) and comfortable(runs.slope) and task.known[COUNT * job.unit_groups + p.g] > 0
    return vec is doubles or (ok and comfortable(mean))


# ---- tiles -----------------------------------------------------------------------------------------


cdef inline Py_ssize_t whole_lines(Py_ssize_t values, Py_ssize_t itemsize) noexcept nogil:
    """How many channels make a tile: if it can be, such that tiles end with a line of memory, as half a line streamed
    takes as long as some whole ones (30 ns; 512 x 256 x 14 x 14 took 1.4 times as long)."""
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
    runs.xstep = runs.ostep = runs.ystep = runs.values
    t.lanes = runs.channels * runs.values
    return t.c < p.c + p.channels


# ---- y and dx --------------------------------------------------------------------------------------


cdef inline bint runs_directly(const Job *job, const Part *p, const View *other, const stored *_) noexcept nogil:
    """Whether channels are worked on where they lie: streamed ones are long, as each ends within a line."""
    return (in_runs(job, &job.x, _) and in_runs(job, other, _) and in_runs(job, &job.y, _)
            and (not job.y.streamed or (p.values >= STREAMED and job.x.data != job.y.data and other.data != job.y.data)))


cdef void apply_part(const Task *task, int kind, const Part *p, Runs *runs, const stored *_, vec like) noexcept nogil:
    """y or dx of some channels, where they lie or tile by tile."""
    cdef const Job *job = task.job
    cdef const View *other = &job.dy if kind == DX else &job.residual
    cdef Span t = span_of(p)
    cdef const stored *kept = kept_tile(task, &t, _) if kind == DX else NULL
    runs.flow.stream = False
    runs.flow.ahead = job.ahead if in_runs(job, &job.x, _) else 0
    if runs_directly(job, p, other if kept == NULL else &job.x, _) and (kind != DX or plain_dx(task, kept)):
        runs.channels = p.channels
        runs.values = p.values
        runs.xstep = steps_of(&job.x, _)
        runs.ostep = steps_of(other, _) if kept == NULL else job.S
        runs.ystep = steps_of(&job.y, _)
        runs.flow.stream = job.y.streamed
        apply_runs(kind, start_of(&job.x, &t, _), start_of(other, &t, _) if kept == NULL else kept,
                   <stored *> start_of(&job.y, &t, _), runs, like)
        return
    runs.values = 0
    while next_channels(job, p, &t, runs):
        apply_tile(task, RUNS, kind, &t, runs, _, like)


cdef void channels_first_apply(const Task *task, int kind, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const double *slopes = task.known + slopes_at(job) if kind == DX else NULL
    cdef const double *rstd = rstds(job, task.known, task.scratch)
    cdef Unit u = unit_of(job, task.unit)
    cdef Part p
    cdef Runs runs
    cdef Py_ssize_t g
    for g in range(u.groups):
        p = part_of(job, &u, task.chunk, g)
        if group_parameters(task, &p, rstd[g], slopes, &runs, like):
            apply_part(task, kind, &p, &runs, _, like)
        else:
            group_parameters(task, &p, rstd[g], slopes, &runs, gn_all_doubles(0))
            apply_part(task, kind, &p, &runs, <const double *> NULL, gn_all_doubles(0))


# ---- the gradient's sums ---------------------------------------------------------------------------


cdef bint centre_sums(Py_ssize_t channels, double rest, double *sum, double *product) noexcept nogil:
    """Bring the products of one group's channels to their mean, of which `rest` was left out; returns whether float32
    carried them."""
    cdef doubles zero = gn_all_doubles(0), largest = zero, none = zero, s, p
    cdef Py_ssize_t i = 0, k, n
    for k in range((channels + DOUBLES - 1) // DOUBLES):
        n = min(DOUBLES, channels - i)
        s = some_of(<const double *> sum + i, n, zero)
        p = some_of(<const double *> product + i, n, zero) - gn_all_doubles(rest) * s
        store_few(product + i, p, n, False)
        largest = most(absolute(s), largest)
        none += (s - s) + (p - p)  # NaN, if one is not finite
        i += DOUBLES
    none = where_at_most(none, zero, zero, gn_all_doubles(1))
    return not (gn_any_less(zero, none) or gn_any_less(gn_all_doubles(2.0 ** 60), largest)
                or not gn_any_less(gn_all_doubles(2.0 ** -60), largest))


cdef inline void sum_run(const Job *job, const stored *x, const stored *dy, Py_ssize_t n, double pivot, double *sum,
                         double *product, vec mean) noexcept nogil:
    """Of a channel, in float64 if its group has few values."""
    if job.K * job.S < FEW:
        sum_channel(x, dy, n, gn_all_doubles(pivot), pivot, sum, product)
    else:
        sum_channel(x, dy, n, mean, pivot, sum, product)


cdef void sums_part(const Task *task, const Part *p, Runs *runs, double *sum, double *product, const stored *_,
                    vec like) noexcept nogil:
    """The sums of some channels."""
    cdef const Job *job = task.job
    cdef double lanes[2 * LANES]
    cdef vec mean = all_of(runs.mean, like)
    cdef const stored *x
    cdef const stored *dy
    cdef Py_ssize_t c, i
    cdef Span t = span_of(p)
    if plain_gradient(job) and in_runs(job, &job.x, _) and in_runs(job, &job.dy, _):
        x = start_of(&job.x, &t, _)
        dy = start_of(&job.dy, &t, _)
        for c in range(p.channels):
            sum_run(job, x, dy, p.values, runs.mean, sum + c, product + c, mean)
            x += steps_of(&job.x, _)
            dy += steps_of(&job.dy, _)
        return
    memset(lanes, 0, sizeof(lanes))
    runs.values = 0
    runs.flow.stream = False
    runs.flow.ahead = 0
    while next_channels(job, p, &t, runs):
        x = x_of(job, &t, task.scratch, _)
        dy = gradient_tile(task, RUNS, &t, x, runs, like)
        c = t.c - p.c
        if runs.values < p.values:  # a part of a channel
            add_values(x, dy, runs.values, mean, runs.mean, lanes)
            gn_total(lanes, sum + c, product + c)
            if t.s + runs.values == p.s + p.values:
                memset(lanes, 0, sizeof(lanes))
        else:
            for i in range(runs.channels):
                sum_run(job, x + i * runs.values, dy + i * runs.values, runs.values, runs.mean, sum + c + i,
                        product + c + i, mean)


cdef bint group_sums(const Task *task, const Unit *u, const Part *p, double rstd, const stored *_,
                     vec like) noexcept nogil:
    """The sums of one group's channels; returns whether they were carried."""
    cdef double *sums = task.found + sums_at(task.job) + p.c - u.c
    cdef double mean = task.known[PIVOT * u.groups + p.g]
    cdef Runs runs
    if vec is floats and not sums_carried(rstd, mean):
        return False
    if task.job.activation != IDENTITY and not group_parameters(task, p, rstd, NULL, &runs, like):
        return False
    runs.mean = in_type(mean, like)
    sums_part(task, p, &runs, sums, sums + u.channels, _, like)
    return centre_sums(p.channels, rest_of(mean, like), sums, sums + u.channels) or vec is doubles


cdef void channels_first_sums(const Task *task, const stored *_, vec like) noexcept nogil:
    cdef const Job *job = task.job
    cdef const double *rstd = rstds(job, task.known, task.scratch)
    cdef Unit u = unit_of(job, task.unit)
    cdef Part p
    cdef Py_ssize_t g
    for g in range(u.groups):
        p = part_of(job, &u, task.chunk, g)
        if not group_sums(task, &u, &p, rstd[g], _, like):
            group_sums(task, &u, &p, rstd[g], <const double *> NULL, gn_all_doubles(0))


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


cdef void take_sums(const Job *job, Py_ssize_t unit, double *known, const Scratch *scratch) noexcept nogil:
    """a and b of a unit's groups, from the sums of each sample that are given."""
    cdef Unit u = unit_of(job, unit)
    cdef double *slopes = known + slopes_at(job)
    cdef const double *dbias = job.dbias + u.n * job.C
    cdef const double *dweight = job.dweight + u.n * job.C
    cdef double count, weight = 1, a, b
    cdef Py_ssize_t g, c
    for g in range(u.groups):
        count = known[COUNT * u.groups + g]
        a = b = 0
        for c in range(u.c + g * job.K, u.c + (g + 1) * job.K):
            read_channels(&job.weight, u.n, c, 1, 1, &weight)
            a += weight * dbias[c]
            b += weight * dweight[c]
        slopes[2 * g] = a / count if count > 0 else 0
        slopes[2 * g + 1] = b / count if count > 0 else 0


cdef void add_sums(const Job *job, double *into, const double *other) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(sums_at(job), slopes_at(job) + 2 * job.unit_groups):
        into[i] += other[i]

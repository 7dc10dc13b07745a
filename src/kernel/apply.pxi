# What is done to vectors once the statistics are known, in the three ways that parameters come: one of each for a run
# of a channel's positions, one for each lane of rows of channels, or a weight and a bias for each value of short
# channels.
#
#     y = act((x - mean) * scale + shift + residual)        scale = weight * rstd, shift = bias
#     dx = dy' * scale - ((x - mean) * slope + constant)    slope = rstd^2 * b, constant = rstd * a
#
# The mean is subtracted first: x * scale + (bias - mean * scale) would lose the digits that x and the mean share. What
# rounding the mean to the compute type leaves out is in shift and constant. `other` is the residual, if there is one,
# or dy'.

cdef enum:
    DX = 1 << 8  # what is applied, if not an activation

cdef struct Flow:
    bint stream  # y is written past the caches
    Py_ssize_t ahead  # bytes behind x that are asked for meanwhile, or 0


cdef struct Runs:  # channels of a group, so many values of each in a row
    Py_ssize_t channels, values
    Py_ssize_t xstep, ostep, ystep  # from channel to channel, of x, the other and y
    double mean, slope, constant
    const double *scale  # of each channel
    const double *shift
    double leak
    Flow flow


cdef struct Grid:  # rows of lanes
    Py_ssize_t rows, lanes
    Py_ssize_t xrow, orow, yrow  # from row to row, of x, the other and y
    void *mean  # of each lane, in the compute type
    void *scale
    void *shift
    void *slope  # negative, as the constant is
    void *constant
    double leak
    Flow flow


cdef struct Values:  # of groups with short channels, one behind the other
    Py_ssize_t groups, values  # of each
    const double *mean  # of each group
    const double *rstd
    const double *rest  # (x - mean) * rstd + rest is normalized
    const double *slope
    const double *constant
    const void *weight  # of each value, in the compute type
    const void *bias
    double leak


cdef inline double in_type(double v, vec like) noexcept nogil:
    return <float> v if vec is floats else v


cdef inline vec activated_sum(int kind, vec z, const stored *residual, Py_ssize_t n, vec leak) noexcept nogil:
    return activated(kind, z if residual == NULL else z + few_of(residual, n, z), leak)


cdef inline vec applied(int kind, const stored *x, const stored *other, Py_ssize_t n, const vec *a) noexcept nogil:
    """dx, or y, of n values. `a` is mean, scale, shift and the leak; or mean, scale, -slope and -constant."""
    cdef vec d = few_of(x, n, a[0]) - a[0]
    if kind == DX:
        return fma(few_of(other, n, d), a[1], fma(d, a[2], a[3]))
    return activated_sum(kind, fma(d, a[1], a[2]), other, n, a[3])


# ---- runs ------------------------------------------------------------------------------------------


cdef inline Py_ssize_t before_vector(const stored *y, vec like) noexcept nogil:
    """Values up to an address that a vector can be streamed to."""
    return (gn_before_line(y) % (width(like) * <Py_ssize_t> sizeof(stored))) // <Py_ssize_t> sizeof(stored)


cdef inline void apply_run(int kind, const stored *x, const stored *other, stored *y, Py_ssize_t n, const vec *a,
                           Flow flow) noexcept nogil:
    """The values of one channel. The vectors between the first and the last begin where a vector's worth of y does in
    memory, and these two overlap them; all are found before what they read is overwritten, as y may be x."""
    cdef Py_ssize_t w = width(a[0]), i, k
    cdef vec first = a[0], last = a[0]
    if n < w:
        store_some(y, applied(kind, x, other, n, a), n)
        return
    i = before_vector(y, a[0])
    if i:
        first = applied(kind, x, other, w, a)
    if (n - i) % w:
        last = applied(kind, x + n - w, after(other, n - w), w, a)
    if i and flow.stream:
        store(y, first, False)
    for k in range((n - i) // w):
        if flow.ahead:
            gn_prefetch(<const char *> (x + i + k * w) + flow.ahead)
            if kind == DX:
                gn_prefetch(<const char *> (other + i + k * w) + flow.ahead)
        store(y + i + k * w, applied(kind, x + i + k * w, after(other, i + k * w), w, a), flow.stream)
    if i and not flow.stream:
        store(y, first, False)
    if (n - i) % w:
        store(y + n - w, last, False)


cdef inline void apply_to_runs(int kind, const stored *x, const stored *other, stored *y, const Runs *t, Flow flow,
                               vec like) noexcept nogil:
    cdef vec a[4]
    cdef Py_ssize_t c
    a[0] = all_of(t.mean, like)
    a[2] = all_of(-t.slope if kind == DX else 0, like)
    a[3] = all_of(-t.constant if kind == DX else t.leak, like)
    for c in range(t.channels):
        a[1] = all_of(t.scale[c], like)
        if kind != DX:
            a[2] = all_of(t.shift[c], like)
        apply_run(kind, x + c * t.xstep, after(other, c * t.ostep), y + c * t.ystep, t.values, a, flow)


# ---- rows ------------------------------------------------------------------------------------------


cdef inline void apply_down(int kind, const stored *x, const stored *other, stored *y, const Grid *t, Py_ssize_t rows,
                            Py_ssize_t j, Py_ssize_t n, vec like) noexcept nogil:
    """Down some rows of a vector's lanes, of which n are there: the parameters are loaded once."""
    cdef vec a[4]
    cdef Py_ssize_t r
    a[0] = few_lanes(t.mean, j, n, like)
    a[1] = few_lanes(t.scale, j, n, like)
    a[2] = few_lanes(t.slope if kind == DX else t.shift, j, n, like)
    a[3] = few_lanes(t.constant, j, n, like) if kind == DX else all_of(t.leak, like)
    for r in range(rows):
        if t.flow.ahead:  # several rows at once are out of the order of memory: ask for what comes in that order
            gn_prefetch(<const char *> (x + j * rows + r * n) + t.flow.ahead)
        store_few(y + r * t.yrow + j, applied(kind, x + r * t.xrow + j, after(other, r * t.orow + j), n, a), n,
                  t.flow.stream)


cdef inline void apply_band(int kind, const stored *x, const stored *other, stored *y, const Grid *t, Py_ssize_t rows,
                            vec like) noexcept nogil:
    cdef Py_ssize_t w = width(like), k, whole = t.lanes // w
    for k in range(whole):
        apply_down(kind, x, other, y, t, rows, k * w, w, like)
    if t.lanes % w:
        apply_down(kind, x, other, y, t, rows, whole * w, t.lanes % w, like)


cdef inline void apply_to_rows(int kind, const stored *x, const stored *other, stored *y, const Grid *t,
                               vec like) noexcept nogil:
    cdef Py_ssize_t r, fours = t.rows - t.rows % 4 if kind == DX or kind <= RELU else 0
    for r from 0 <= r < fours by 4:
        apply_band(kind, x + r * t.xrow, after(other, r * t.orow), y + r * t.yrow, t, 4, like)
    for r in range(fours, t.rows):
        apply_band(kind, x + r * t.xrow, after(other, r * t.orow), y + r * t.yrow, t, 1, like)


# ---- values ----------------------------------------------------------------------------------------


cdef inline void apply_to_some(int kind, const stored *x, const stored *other, stored *y, const Values *t, vec *a,
                               Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """n values from the i-th on. `a` is mean, rstd, rest and the leak; or mean, rstd, -slope and -constant."""
    cdef vec w = few_lanes(t.weight, i, n, a[0]), z
    cdef vec b[4]
    if kind == DX:
        b[0] = a[0]
        b[1] = w * a[1]
        b[2] = a[2]
        b[3] = a[3]
        z = applied(DX, x + i, other + i, n, b)
    else:
        z = fma(applied(IDENTITY, x + i, <const stored *> NULL, n, a), w, few_lanes(t.bias, i, n, a[0]))
        z = activated_sum(kind, z, after(other, i), n, a[3])
    store_few(y + i, z, n, False)


cdef inline void apply_to_values(int kind, const stored *x, const stored *other, stored *y, const Values *t,
                                 vec like) noexcept nogil:
    cdef vec a[4]
    cdef Py_ssize_t w = width(like), i = 0, k, g
    for g in range(t.groups):
        a[0] = all_of(t.mean[g], like)
        a[1] = all_of(t.rstd[g], like)
        a[2] = all_of(-t.slope[g] if kind == DX else t.rest[g], like)
        a[3] = all_of(-t.constant[g] if kind == DX else t.leak, like)
        for k in range(t.values // w):
            apply_to_some(kind, x, other, y, t, a, i, w)
            i += w
        if t.values % w:
            apply_to_some(kind, x, other, y, t, a, i, t.values % w)
            i += t.values % w


# ---- dy' -------------------------------------------------------------------------------------------


cdef inline void apply_slopes(int kind, const stored *z, const stored *dy, stored *to, const Runs *t,
                              vec like) noexcept nogil:
    """dy * act'(z) of a tile."""
    cdef Py_ssize_t w = width(like), i = t.values - t.values % w, k
    cdef vec leak = all_of(t.leak, like)
    for k in range(t.values // w):
        store(to + k * w, dy_before(kind, load(z + k * w, like), load(dy + k * w, like), leak), False)
    if t.values % w:
        store_some(to + i, dy_before(kind, few_of(z + i, t.values % w, like), few_of(dy + i, t.values % w, like), leak),
                   t.values % w)


# ---- the kinds, each with loops of its own ----------------------------------------------------------

cdef enum:
    RUNS, GRID, VALUES, SLOPES


cdef inline void apply_to(int way, int kind, const stored *x, const stored *other, stored *y, const void *t,
                          vec like) noexcept nogil:
    cdef const Runs *runs = <const Runs *> t
    cdef Flow plain
    if way == GRID:
        apply_to_rows(kind, x, other, y, <const Grid *> t, like)
    elif way == VALUES:
        apply_to_values(kind, x, other, y, <const Values *> t, like)
    elif way == SLOPES:
        apply_slopes(kind, x, other, y, runs, like)
    elif (kind == IDENTITY or kind == DX) and not runs.flow.stream and not runs.flow.ahead:
        plain.stream = False
        plain.ahead = 0
        apply_to_runs(kind, x, other, y, runs, plain, like)  # from a cache: here each test would tell
    else:
        apply_to_runs(kind, x, other, y, runs, runs.flow, like)


cdef inline void apply_kind(int way, int kind, const stored *x, const stored *other, stored *y, const void *t,
                            vec like) noexcept nogil:
    if kind == DX:
        gn_assume(other != NULL)
        apply_to(way, DX, x, other, y, t, like)
    elif kind == IDENTITY and other == NULL:
        apply_to(way, IDENTITY, x, <const stored *> NULL, y, t, like)
    elif kind == IDENTITY:
        apply_to(way, IDENTITY, x, other, y, t, like)
    elif kind == RELU:
        apply_to(way, RELU, x, other, y, t, like)
    elif kind == LEAKY_RELU:
        apply_to(way, LEAKY_RELU, x, other, y, t, like)
    elif kind == SILU:
        apply_to(way, SILU, x, other, y, t, like)
    elif kind == GELU:
        apply_to(way, GELU, x, other, y, t, like)
    elif kind == GELU_TANH:
        apply_to(way, GELU_TANH, x, other, y, t, like)
    elif kind == MISH:
        apply_to(way, MISH, x, other, y, t, like)
    elif kind == HARDSWISH:
        apply_to(way, HARDSWISH, x, other, y, t, like)
    elif kind == SIGMOID:
        apply_to(way, SIGMOID, x, other, y, t, like)
    else:
        apply_to(way, TANH, x, other, y, t, like)


cdef void apply_runs(int kind, const stored *x, const stored *other, stored *y, const Runs *t, vec like) noexcept nogil:
    apply_kind(RUNS, kind, x, other, y, t, like)


cdef void apply_rows(int kind, const stored *x, const stored *other, stored *y, const Grid *t, vec like) noexcept nogil:
    apply_kind(GRID, kind, x, other, y, t, like)


cdef void apply_values(int kind, const stored *x, const stored *other, stored *y, const Values *t,
                       vec like) noexcept nogil:
    apply_kind(VALUES, kind, x, other, y, t, like)


cdef void activate_gradient(int kind, const stored *z, const stored *dy, stored *to, const Runs *t,
                            vec like) noexcept nogil:
    """dy' of a tile of dy, for tiles of the compute type: with an activation, there are no others."""
    if stored is float or stored is double:
        apply_kind(SLOPES, kind, z, dy, to, t, like)


# ---- tiles -----------------------------------------------------------------------------------------


cdef void apply_in(int way, int kind, const stored *x, const stored *other, stored *y, const void *t,
                   vec like) noexcept nogil:
    if way == RUNS:
        apply_runs(kind, x, other, y, <const Runs *> t, like)
    elif way == GRID:
        apply_rows(kind, x, other, y, <const Grid *> t, like)
    else:
        apply_values(kind, x, other, y, <const Values *> t, like)


cdef inline const stored *start_of(const View *v, const Span *t, const stored *_) noexcept nogil:
    return <const stored *> NULL if v.data == NULL else <const stored *> address(v, t.n, t.c, t.s)


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


cdef inline bint plain_gradient(const Job *job) noexcept nogil:
    """Whether dy' is dy."""
    return job.activation == IDENTITY and job.mask.data == NULL and job.dresidual.data == NULL


cdef inline bint nothing_counts(const Job *job, const double *known) noexcept nogil:
    """Whether nothing counts in one of the unit's groups."""
    cdef Py_ssize_t g
    cdef bint none = False
    for g in range(job.unit_groups):
        none |= known[COUNT * job.unit_groups + g] == 0
    return none


cdef inline bint plain_dx(const Task *task, const void *kept) noexcept nogil:
    """Whether dx is of x, and of dy as it lies in memory or dy' as it is kept, and nothing else is written."""
    return ((plain_gradient(task.job) or (kept != NULL and task.job.dresidual.data == NULL))
            and not nothing_counts(task.job, task.known))


cdef inline const stored *x_of(const Job *job, const Span *t, const Scratch *scratch, const stored *_) noexcept nogil:
    """x of a tile of the gradient: a copy, if some of it may be cleaned."""
    if job.mask.data == NULL:
        return packed(job, &job.x, t, <stored *> scratch.x)
    read_tile(job, &job.x, t, <stored *> scratch.x)
    return <stored *> scratch.x


cdef void clean(const uint8_t *mask, const stored *dy, stored *values, Py_ssize_t positions,
                Py_ssize_t lanes) noexcept nogil:
    """Values of masked positions are 0 where dy is 0: whatever they were, they contribute nothing."""
    cdef Py_ssize_t i, j
    for i in range(positions):
        for j in range(i * lanes, (i + 1) * lanes if mask[i] == 0 else 0):
            if scalar(dy[j]) == 0:
                put_value(values + j, 0)


cdef inline stored *kept_tile(const Task *task, const Span *t, const stored *_) noexcept nogil:
    """Where dy' of a tile is kept until dx is made of it, or NULL. What falls back to float64 is not kept; what is made
    in float32 was summed in it first."""
    cdef const Job *job = task.job
    if task.kept == NULL or storage_as(_) != job.work:
        return NULL
    if not job.channels_last:
        return <stored *> task.kept + (t.c - unit_of(job, task.unit).c) * job.S + t.s
    return <stored *> task.kept + t.s * job.C if t.lanes == job.C else NULL


cdef const stored *gradient_tile(const Task *task, int way, const Span *t, const stored *x, const void *parameters,
                                 vec like) noexcept nogil:
    """dy' of a tile: in scratch, if it is asked for again when dx, which may lie in dy's place, is there."""
    cdef const Job *job = task.job
    cdef stored *z = <stored *> task.scratch.y
    cdef stored *kept = kept_tile(task, t, x)
    cdef stored *own = <stored *> task.scratch.dy if kept == NULL else kept
    cdef const stored *dy = own
    cdef const uint8_t *mask = load_mask(job, t[0], task.scratch.mask)
    cdef Py_ssize_t positions = t.rows if job.channels_last else t.lanes, lanes = t.lanes if job.channels_last else 1
    cdef Runs runs
    if job.activation != IDENTITY:
        apply_in(way, IDENTITY, x, packed(job, &job.residual, t, z), z, parameters, like)
    if job.activation != IDENTITY or (plain_gradient(job) and job.y.data != job.dy.data):
        dy = packed(job, &job.dy, t, own)
    else:
        read_tile(job, &job.dy, t, own)
    if job.activation != IDENTITY:
        if mask != NULL:
            clean(mask, dy, z, positions, lanes)
        runs.values = t.rows * t.lanes
        runs.leak = job.leak
        activate_gradient(job.activation, z, dy, own, &runs, like)
        dy = own
    if mask != NULL:
        clean(mask, dy, <stored *> x, positions, lanes)
    return dy


cdef void finish_dx(const Task *task, const Span *t, const stored *dy, stored *dx) noexcept nogil:
    """Write dresidual, and dx where no statistics were moved, as a position did not count or nothing did."""
    cdef const Job *job = task.job
    cdef const double *known = task.known
    cdef const uint8_t *mask = load_mask(job, t[0], task.scratch.mask)
    cdef Unit u = unit_of(job, task.unit)
    cdef Py_ssize_t lanes = t.lanes if job.channels_last else 1, positions = t.rows * t.lanes // lanes
    cdef Py_ssize_t i, j, c = -1, g, now
    cdef double scale = 0
    cdef bint none = False
    if job.dresidual.data != NULL:
        write_tile(job, &job.dresidual, t, dy)
    if mask == NULL and not nothing_counts(job, known):
        return
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
                put_value(dx + i * lanes + j, scalar(dy[i * lanes + j]) * scale)


cdef void apply_tile(const Task *task, int way, int kind, const Span *t, const void *parameters, const stored *_,
                     vec like) noexcept nogil:
    """y or dx of a tile."""
    cdef const Job *job = task.job
    cdef const stored *x
    cdef const stored *other
    cdef stored *y = target(job, &job.y, t, <stored *> task.scratch.y)
    if kind == DX:
        x = x_of(job, t, task.scratch, _)
        other = kept_tile(task, t, _)
        if other == NULL:
            other = gradient_tile(task, way, t, x, parameters, like)
    else:
        x = packed(job, &job.x, t, <stored *> task.scratch.x)
        other = packed(job, &job.residual, t, <stored *> task.scratch.y)
    apply_in(way, kind, x, other, y, parameters, like)
    if kind == DX:
        finish_dx(task, t, other, y)
    if y == <stored *> task.scratch.y:
        write_tile(job, &job.y, t, y)

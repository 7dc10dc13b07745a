# The affine: y = act((x - mean) * rstd * weight + bias + residual) on a chunk, tile by tile; and the planar walk. That
# of channels-last lives in interleaved.pxi.


ctypedef fused value:  # of weights and biases, which may be wider than the compute type
    float
    double


cdef struct Standard:  # a group's part of the affine: x * power - mean - rest is (x - mean) * rstd / factor
    double power, mean, rest, factor


cdef inline void standardize(const double *stats, Py_ssize_t groups, Py_ssize_t g, double eps, Standard *z, real _) noexcept nogil:
    """Split the mean into a value of the compute type and the rest, up to 3% of a standard deviation where mean/std is
    1e6. The power of two below rstd costs no bit and keeps all factors in range for any finite x."""
    cdef double mean = stats[PIVOT * groups + g]
    cdef double rstd = 1 / sqrt(stats[M2 * groups + g] / max(stats[COUNT * groups + g], 1.0) + eps)
    z.power = power_near(rstd)
    if not -1e30 < mean * z.power < 1e30:
        z.power = 1
    z.mean = <real> (mean * z.power)
    z.rest = mean * z.power - z.mean
    z.factor = rstd / z.power


cdef inline const value *of_channels(const View *v, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, value absent, value *buffer) noexcept nogil:
    """A weight's or bias's values, where they lie if they need no conversion."""
    cdef Py_ssize_t i
    if v.data == NULL:
        for i in range(channels):
            buffer[i] = absent
    elif v.storage >= FLOAT32 and v.itemsize == sizeof(value) and v.channel_stride == sizeof(value):
        return <const value *> address(v, n, c, 0)
    else:
        read_run[value](v, address(v, n, c, 0), v.channel_stride, buffer, channels)
    return buffer


cdef inline void weigh_as(const Job *job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, double factor, double rest,
                          real *scale, real *shift, value _) noexcept nogil:
    cdef value wbuffer[WIDTH]
    cdef value bbuffer[WIDTH]
    cdef const value *weight = of_channels[value](&job.weight, n, c, channels, 1, wbuffer)
    cdef const value *bias = of_channels[value](&job.bias, n, c, channels, 0, bbuffer)
    cdef real each, moved
    cdef Py_ssize_t i
    for i in range(channels):
        each = <real> (weight[i] * factor)
        scale[i] = each
        moved = each if each - each == 0 else <real> 0  # an infinite weight makes no NaN of its own
        shift[i] = <real> (bias[i] - <real> rest * moved)


cdef void weigh(const Job *job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, const Standard *z,
                real *scale, real *shift) noexcept nogil:
    """For channels of one group: (x * power - mean) * scale + shift is the normalized, weighted and biased x."""
    if real is double or job.weight.storage == FLOAT64 or job.bias.storage == FLOAT64:
        weigh_as[real, double](job, n, c, channels, z.factor, z.rest, scale, shift, 0)
    else:
        weigh_as[real, float](job, n, c, channels, z.factor, z.rest, scale, shift, 0)


cdef inline void add_residual(const Job *job, const Span *t, real *y, Py_ssize_t row) noexcept nogil:
    cdef real tile[AREA]
    cdef const real *residual
    cdef Py_ssize_t r, j, residual_row
    if job.residual.data != NULL:
        residual = load[real](job, &job.residual, t, tile, &residual_row)
        for r in range(t.rows):
            for j in range(t.lanes):
                y[r * row + j] += residual[r * residual_row + j]


cdef void finish(const Job *job, const Span *t, real *y, Py_ssize_t row, const real *buffer) noexcept nogil:
    """What follows the affine: the residual, the activation and, from a buffer, the store."""
    cdef Py_ssize_t r
    add_residual[real](job, t, y, row)
    if job.activation != IDENTITY:
        if row == t.lanes:
            activate[real](job.activation, y, t.rows * t.lanes)
        else:
            for r in range(t.rows):
                activate[real](job.activation, y + r * row, t.lanes)
    if y == buffer:
        move[real](job, &job.y, t, y, True)


# ---- planar ----------------------------------------------------------------------------------------


cdef struct Window:  # the channels of a unit whose scale and shift are at hand
    Py_ssize_t first, count


cdef inline Py_ssize_t next_tile(const Job *job, const Unit *u, Py_ssize_t left, const Standard *z,
                                 Span *t, Window *w, real *scale, real *shift) noexcept nogil:
    """Set the size of the tile at t and bring its channels into the window; the place there of the first one."""
    cdef Py_ssize_t place = t.c - u.c - w.first, channels = 1
    t.lanes = min(left, TILE if job.S >= SHORT else WIDTH)
    if t.s + t.lanes > job.S:
        channels = (t.s + t.lanes - 1) // job.S + 1
    if place + channels > w.count:
        w.first += place
        w.count = min(WIDTH, (t.s + left - 1) // job.S + 1)
        weigh[real](job, t.n, t.c, w.count, z, scale, shift)
        place = 0
    return place


cdef inline void repeat(const real *v, Py_ssize_t first, Py_ssize_t times, Py_ssize_t n, real *each) noexcept nogil:
    """Each value of v `times` times, the first of them `first` times, n in all."""
    cdef Py_ssize_t i = 0, j, run = first
    while i < n:
        for j in range(i, min(i + run, n)):
            each[j] = v[0]
        i += run
        v += 1
        run = times


cdef inline void planar_run(const real *x, real *y, Py_ssize_t n, real power, real mean, real scale, real shift) noexcept nogil:
    """y = (x * power - mean) * scale + shift on values of a channel. The last SHORT overlap those before, as single values
    would take longer than all the rest of a short run."""
    cdef Py_ssize_t j
    for j in range(n // SHORT * SHORT if n > SHORT else n):
        y[j] = (x[j] * power - mean) * scale + shift
    if n > SHORT and n % SHORT:
        for j in range(n - SHORT, n):
            y[j] = (x[j] * power - mean) * scale + shift


cdef inline void planar_tile(const Job *job, const Span *t, const real *x, real *y, real power, real mean,
                             const real *scale, const real *shift) noexcept nogil:
    """The affine of a tile, with a scale and a shift for each channel."""
    cdef real each_scale[WIDTH]
    cdef real each_shift[WIDTH]
    cdef Py_ssize_t i = 0, j, run = job.S - t.s
    if job.S >= SHORT:
        while i < t.lanes:
            run = min(run, t.lanes - i)
            planar_run[real](x + i, y + i, run, power, mean, scale[0], shift[0])
            i += run
            run = job.S
            scale += 1
            shift += 1
        return
    if job.S > 1:
        repeat[real](scale, run, job.S, t.lanes, each_scale)
        repeat[real](shift, run, job.S, t.lanes, each_shift)
        scale = each_scale
        shift = each_shift
    for j in range(t.lanes):
        y[j] = (x[j] * power - mean) * scale[j] + shift[j]


cdef void planar_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, real _) noexcept nogil:
    cdef real xtile[TILE]
    cdef real ytile[TILE]
    cdef real scale[WIDTH]
    cdef real shift[WIDTH]
    cdef Py_ssize_t pos, stop, row, c
    cdef const real *x
    cdef real *y
    cdef Unit u = unit_of(job, unit)
    cdef Window w
    cdef Standard z
    cdef Span whole, t
    standardize[real](known, 1, 0, job.eps, &z, 0)
    bounds(job, chunk, &pos, &stop)
    whole = t = planar_span(job, &u, pos, stop - pos)
    w.first = t.c - u.c
    w.count = 0
    while t.lanes > 0:
        c = next_tile[real](job, &u, t.lanes, &z, &t, &w, scale, shift)
        x = load[real](job, &job.x, &t, xtile, &row)
        if job.ahead > 0:  # a share of what the next unit will read, as this one's tiles keep the core busy
            gn_prefetch(address(&job.x, t.n, t.c, t.s) + job.ahead, t.lanes * job.x.itemsize)
        y = direct[real](job, &job.y, &t, ytile, &row)
        planar_tile[real](job, &t, x, y, <real> z.power, <real> z.mean, scale + c, shift + c)
        finish[real](job, &t, y, t.lanes, ytile)
        advance(job, &whole, &t)

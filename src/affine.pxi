# The affine: y = act((x - mean) * rstd * weight + bias + residual) on a chunk, tile by tile; and the planar walk. That
# of channels-last lives in interleaved.pxi, that of two dimensions in single.pxi.


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


cdef enum:  # the affine's parameters, field by field: (x * power - centre) * scale + offset, each of WIDTH channels or lanes
    POWER = 0
    CENTRE = WIDTH
    SCALE = 2 * WIDTH
    OFFSET = 3 * WIDTH
    PARAMETERS = 4 * WIDTH


cdef inline void weigh_as(const Job *job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, double factor, double rest,
                          real *a, value _) noexcept nogil:
    cdef value wbuffer[WIDTH]
    cdef value bbuffer[WIDTH]
    cdef const value *weight = of_channels[value](&job.weight, n, c, channels, 1, wbuffer)
    cdef const value *bias = of_channels[value](&job.bias, n, c, channels, 0, bbuffer)
    cdef bint moved = job.dy.data == NULL or job.activation != IDENTITY  # else the gradient asks for no offset
    cdef real each
    cdef Py_ssize_t i, k
    for k in range(channels // LANES):
        i = k * LANES
        put_lanes(a + SCALE + i, lanes_at(weight + i) * factor)
    for i in range(channels - channels % LANES, channels):
        a[SCALE + i] = <real> (weight[i] * factor)
    for i in range(channels if moved else 0):
        each = a[SCALE + i]
        each = each if each - each == 0 else <real> 0  # an infinite weight makes no NaN of its own
        a[OFFSET + i] = <real> (bias[i] - <real> rest * each)


cdef void weigh(const Job *job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, const Standard *z, real *a) noexcept nogil:
    """Scale and offset of channels of one group."""
    if real is double or job.weight.storage == FLOAT64 or job.bias.storage == FLOAT64:
        weigh_as[real, double](job, n, c, channels, z.factor, z.rest, a, 0)
    else:
        weigh_as[real, float](job, n, c, channels, z.factor, z.rest, a, 0)


cdef inline void centre(Py_ssize_t channels, const Standard *z, real *a) noexcept nogil:
    """Power and centre, which channels of one group share."""
    cdef Py_ssize_t i
    for i in range(channels):
        a[POWER + i] = <real> z.power
        a[CENTRE + i] = <real> z.mean


cdef struct Flow:  # how a run of values passes through the core
    Py_ssize_t step  # from one residual to the next: 1, or 0 if there is none
    Py_ssize_t ahead  # bytes behind x that are asked for meanwhile, or 0
    bint stream  # y is written past the caches


cdef inline void store_block(const real *z, stored *y, bint stream) noexcept nogil:
    cdef stored narrowed[SHORT]
    if stream:
        narrow[real, stored](z, narrowed, SHORT)
        gn_stream_lines(y, narrowed, sizeof(narrowed))
    else:
        narrow[real, stored](z, y, SHORT)


cdef inline void affine_block(const stored *x, const real *residual, stored *y, const real *a, Py_ssize_t i, bint each,
                              bint residing, int activation, bint stream) noexcept nogil:
    """SHORT values with a parameter for each, from the i-th on, or one for all. From its loops over a constant number of
    values the compiler makes one, whose values never leave the registers (with a + i instead of the index they do: it
    takes the parameters for values that its stores might change)."""
    cdef real wide[SHORT]
    cdef real z[SHORT]
    cdef Py_ssize_t j
    widen[stored, real](x, wide, SHORT)
    if each:
        for j in range(SHORT):
            z[j] = (wide[j] * a[POWER + i + j] - a[CENTRE + i + j]) * a[SCALE + i + j] + a[OFFSET + i + j]
    else:
        for j in range(SHORT):
            z[j] = (wide[j] * a[POWER] - a[CENTRE]) * a[SCALE] + a[OFFSET]
    if residing:
        for j in range(SHORT):
            z[j] += residual[j]
    for j in range(SHORT):
        z[j] = activated(activation, z[j])
    store_block[real, stored](z, y, stream)


# The blocks of a run of at least SHORT values: at first the last one, which overlaps the one before, as single values
# would take longer than all the rest of a short run; and the one before the first whole line of memory if y is streamed.
# They come before any of their values is overwritten. What is streamed is apart from what is read.

cdef inline Py_ssize_t first_block(Py_ssize_t n, Py_ssize_t head) noexcept nogil:
    return -2 if head else -1 if n % SHORT else 0


cdef inline Py_ssize_t place_of_block(Py_ssize_t i, Py_ssize_t n, Py_ssize_t head) noexcept nogil:
    return head + i * SHORT if i >= 0 else n - SHORT if i == -1 else 0


cdef inline void affine_blocks(const stored *x, const real *residual, stored *y, Py_ssize_t n, const real *a, bint each,
                               bint plain, int activation, const Flow *flow) noexcept nogil:
    cdef stored last[SHORT]
    cdef stored *spare = last
    cdef Py_ssize_t head = gn_before_line(y) // <Py_ssize_t> sizeof(stored) if flow.stream else 0, i, j
    cdef bint in_place = <const void *> x == <const void *> y or <const void *> residual == <const void *> y
    cdef bint kept = n % SHORT and in_place  # the last block, until the others are done
    if kept:
        memset(last, 0, sizeof(last))
    for i in range(first_block(n, head), (n - head) // SHORT):
        j = place_of_block(i, n, head)
        if not plain and flow.ahead:
            gn_prefetch(<const char *> (x + j) + flow.ahead, SHORT * sizeof(stored))
        affine_block[stored, real](x + j, residual + j * flow.step, spare if kept and i < 0 else y + j, a, j, each, not plain,
                                   activation, not plain and flow.stream and i >= 0)
    if kept:
        memcpy(y + n - SHORT, last, sizeof(last))


cdef inline void affine_run(const stored *x, const real *residual, stored *y, Py_ssize_t n, const real *a, bint each,
                            int activation, Flow flow) noexcept nogil:
    """y = act((x * power - centre) * scale + offset + residual) on values in a row; fewer than SHORT are filled up."""
    cdef stored xfull[SHORT]
    cdef stored yfull[SHORT]
    cdef real rfull[SHORT]
    cdef stored *to = y
    cdef Py_ssize_t values = n
    cdef bint short = n < SHORT
    if short:
        memset(xfull, 0, sizeof(xfull))
        memset(rfull, 0, sizeof(rfull))
        memcpy(xfull, x, n * sizeof(stored))
        memcpy(rfull, residual, (n if flow.step else SHORT) * sizeof(real))
        x = xfull
        residual = rfull
        y = yfull
        flow.stream = False
        n = SHORT
    if activation == IDENTITY and not (flow.step or flow.stream or flow.ahead):  # from a cache: here each test would tell
        affine_blocks[stored, real](x, residual, y, n, a, each, True, activation, &flow)
    else:
        affine_blocks[stored, real](x, residual, y, n, a, each, False, activation, &flow)
    if short:
        memcpy(to, yfull, values * sizeof(stored))


# One loop for each activation, in which it is a constant.

cdef inline void lanes_activated_as(const stored *x, Py_ssize_t xrow, const real *residual, Py_ssize_t rrow, stored *y, Py_ssize_t yrow,
                                    Py_ssize_t rows, Py_ssize_t lanes, const real *a, int activation, Flow flow) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(rows):
        affine_run[stored, real](x + r * xrow, residual + r * rrow * flow.step, y + r * yrow, lanes, a, True, activation, flow)


cdef void lanes_activated(const stored *x, Py_ssize_t xrow, const real *residual, Py_ssize_t rrow, stored *y, Py_ssize_t yrow,
                          Py_ssize_t rows, Py_ssize_t lanes, const real *a, int activation, Flow flow) noexcept nogil:
    """The affine of rows of lanes, with parameters for each lane."""
    if activation == IDENTITY:
        lanes_activated_as[stored, real](x, xrow, residual, rrow, y, yrow, rows, lanes, a, IDENTITY, flow)
    elif activation == RELU:
        lanes_activated_as[stored, real](x, xrow, residual, rrow, y, yrow, rows, lanes, a, RELU, flow)
    elif activation == SILU:
        lanes_activated_as[stored, real](x, xrow, residual, rrow, y, yrow, rows, lanes, a, SILU, flow)
    elif activation == GELU:
        lanes_activated_as[stored, real](x, xrow, residual, rrow, y, yrow, rows, lanes, a, GELU, flow)
    elif activation == GELU_TANH:
        lanes_activated_as[stored, real](x, xrow, residual, rrow, y, yrow, rows, lanes, a, GELU_TANH, flow)
    else:
        lanes_activated_as[stored, real](x, xrow, residual, rrow, y, yrow, rows, lanes, a, MISH, flow)


cdef inline const real *residual_of(const Job *job, const Span *t, real *tile, Flow *flow, Py_ssize_t *row) noexcept nogil:
    """A span's residual; if there is none SHORT values of -0.0, which change no bit of what they are added to."""
    cdef Py_ssize_t j
    flow.step = job.residual.data != NULL
    if flow.step:
        return in_a_row[real](load[real](job, &job.residual, t, tile, row), row, t, tile)
    row[0] = t.lanes
    for j in range(SHORT):
        tile[j] = <real> -0.0
    return tile


# ---- planar ----------------------------------------------------------------------------------------


cdef struct Window:  # the channels of a unit whose scale and shift are at hand
    Py_ssize_t first, count


cdef inline Py_ssize_t next_tile(const Job *job, const Unit *u, Py_ssize_t left, const Standard *z,
                                 Span *t, Window *w, real *a) noexcept nogil:
    """Set the size of the tile at t and bring its channels into the window; the place there of the first one."""
    cdef Py_ssize_t place = t.c - u.c - w.first, channels = 1
    t.lanes = min(left, TILE if job.S >= SHORT else WIDTH)
    if t.s + t.lanes > job.S:
        channels = (t.s + t.lanes - 1) // job.S + 1
    if place + channels > w.count:
        w.first += place
        w.count = min(WIDTH, (t.s + left - 1) // job.S + 1)
        weigh[real](job, t.n, t.c, w.count, z, a)
        place = 0
    return place


cdef inline bint in_one_piece(const Job *job, Py_ssize_t left, Span *t) noexcept nogil:
    """Make a tile all that is left of its channel, if that is no less and all arrays hold it in a row: then nothing needs
    a tile, and it goes through the registers alone."""
    cdef Span run = t[0]
    run.lanes = min(left, job.S - t.s)
    if (run.lanes < max(t.lanes, SHORT) or not in_one_run(job, &job.x, &run) or not in_one_run(job, &job.y, &run)
            or (job.dy.data != NULL and not in_one_run(job, &job.dy, &run))):
        return False
    t[0] = run
    return True


cdef inline void repeat(const real *v, Py_ssize_t first, Py_ssize_t times, Py_ssize_t n, real *each) noexcept nogil:
    """Each value of v `times` times, the first of them `first` times, n in all."""
    cdef Py_ssize_t i = 0, j, run = first
    while i < n:
        for j in range(i, min(i + run, n)):
            each[j] = v[0]
        i += run
        v += 1
        run = times


cdef inline void runs_activated_as(const stored *x, const real *residual, stored *y, Py_ssize_t first, Py_ssize_t S, Py_ssize_t lanes,
                                   const real *a, int activation, Flow flow) noexcept nogil:
    cdef Py_ssize_t i = 0, run = first
    while i < lanes:
        run = min(run, lanes - i)
        affine_run[stored, real](x + i, residual + i * flow.step, y + i, run, a, False, activation, flow)
        i += run
        run = S
        a += 1


cdef void runs_activated(const stored *x, const real *residual, stored *y, Py_ssize_t first, Py_ssize_t S, Py_ssize_t lanes,
                         const real *a, int activation, Flow flow) noexcept nogil:
    """The affine of channels of S values, with parameters for each channel; of the first one the last values only."""
    if activation == IDENTITY:
        runs_activated_as[stored, real](x, residual, y, first, S, lanes, a, IDENTITY, flow)
    elif activation == RELU:
        runs_activated_as[stored, real](x, residual, y, first, S, lanes, a, RELU, flow)
    elif activation == SILU:
        runs_activated_as[stored, real](x, residual, y, first, S, lanes, a, SILU, flow)
    elif activation == GELU:
        runs_activated_as[stored, real](x, residual, y, first, S, lanes, a, GELU, flow)
    elif activation == GELU_TANH:
        runs_activated_as[stored, real](x, residual, y, first, S, lanes, a, GELU_TANH, flow)
    else:
        runs_activated_as[stored, real](x, residual, y, first, S, lanes, a, MISH, flow)


cdef void planar_tile(const Job *job, const Span *t, const stored *x, const real *residual, stored *y, const real *a,
                      int activation, Flow flow) noexcept nogil:
    """The affine of a tile, with parameters for each channel."""
    cdef real each[PARAMETERS]
    cdef Py_ssize_t field
    if job.S >= SHORT:
        runs_activated[stored, real](x, residual, y, job.S - t.s, job.S, t.lanes, a, activation, flow)
        return
    for field in range(4):
        repeat[real](a + field * WIDTH, job.S - t.s, job.S, t.lanes, each + field * WIDTH)
    lanes_activated[stored, real](x, 0, residual, 0, y, 0, 1, t.lanes, each, activation, flow)


cdef void planar_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, const double *known, real _, stored *_storage) noexcept nogil:
    cdef stored xtile[TILE]
    cdef stored ytile[TILE]
    cdef real rtile[TILE]
    cdef real a[PARAMETERS]
    cdef Py_ssize_t pos, stop, left, row, c
    cdef const stored *x
    cdef const real *residual
    cdef stored *y
    cdef Unit u = unit_of(job, unit)
    cdef Flow flow
    cdef Window w
    cdef Standard z
    cdef Span whole, t
    cdef bint plain = job.y.streamed and job.residual.data == NULL and job.x.data != job.y.data
    standardize[real](known, 1, 0, job.eps, &z, 0)
    bounds(job, chunk, &pos, &stop)
    whole = t = planar_span(job, &u, pos, stop - pos)
    w.first = t.c - u.c
    w.count = 0
    centre[real](min(WIDTH, u.channels), &z, a)
    while t.lanes > 0:
        left = t.lanes
        c = next_tile[real](job, &u, left, &z, &t, &w, a)
        flow.stream = plain and in_one_piece(job, left, &t)
        x = load[stored](job, &job.x, &t, xtile, &row)
        residual = residual_of[real](job, &t, rtile, &flow, &row)
        y = direct[stored](job, &job.y, &t, ytile, flow.stream, &row)
        flow.ahead = job.ahead if x != xtile else 0  # a share of what the next unit will read, as this one keeps the core busy
        planar_tile[stored, real](job, &t, x, residual, y, a + c, job.activation, flow)
        if y == ytile:
            move[stored](job, &job.y, &t, y, True)
        advance(job, &whole, &t)

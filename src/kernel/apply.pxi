# What is done to vectors once the statistics are known, in the three ways that parameters come: one of each for a run of a
# channel's positions, one for each lane of rows of channels, or a weight and a bias for each value of short channels.
#
#     y = act((x - mean) * scale + shift + residual)        scale = weight * rstd, shift = bias
#     dx = dy' * scale - ((x - mean) * slope + constant)    slope = rstd^2 * b, constant = rstd * a
#
# The mean is subtracted first: x * scale + (bias - mean * scale) would lose the digits that x and the mean share. What
# rounding the mean to the compute type leaves out is in shift and constant.

cdef struct Flow:
    bint stream  # y is written past the caches
    Py_ssize_t ahead  # bytes behind x that are asked for meanwhile, or 0


cdef struct Runs:  # channels of a group, so many values of each in a row
    Py_ssize_t channels, values
    Py_ssize_t xstep, rstep, ystep  # from channel to channel, of x, residual (or dy) and y
    double mean, slope, constant
    const double *scale  # of each channel
    const double *shift
    Flow flow


cdef struct Grid:  # rows of lanes
    Py_ssize_t rows, lanes
    Py_ssize_t xrow, rrow, yrow  # from row to row, of x, residual (or dy) and y
    void *mean  # of each lane, in the compute type
    void *scale
    void *shift
    void *slope
    void *constant
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


cdef inline double in_type(double v, vec like) noexcept nogil:
    return <float> v if vec is floats else v


cdef inline vec add_residual(vec z, const stored *residual, Py_ssize_t i) noexcept nogil:
    return z if residual == NULL else z + load(residual + i, z)


# ---- runs ------------------------------------------------------------------------------------------


cdef inline Py_ssize_t before_vector(const stored *y, vec like) noexcept nogil:
    """Values up to an address that a vector can be streamed to."""
    return (gn_before_line(y) % (width(like) * <Py_ssize_t> sizeof(stored))) // <Py_ssize_t> sizeof(stored)


cdef inline void affine_run(const stored *x, const stored *residual, stored *y, Py_ssize_t n, vec *a, int activation,
                            Flow flow) noexcept nogil:
    """The values of one channel. The vectors between the first and the last begin where a vector's worth of y does in memory, and
    these two overlap them; all are found before what they read is overwritten, as y may be x."""
    cdef Py_ssize_t w = width(a[0]), i, k
    cdef vec first = a[0], last = a[0]
    if n < w:
        last = fma(load_some(x, n, a[0]) - a[0], a[1], a[2])
        if residual != NULL:
            last = last + load_some(residual, n, a[0])
        store_some(y, activated(activation, last), n)
        return
    i = before_vector(y, a[0])
    if i:
        first = activated(activation, add_residual(fma(load(x, a[0]) - a[0], a[1], a[2]), residual, 0))
    if (n - i) % w:
        last = activated(activation, add_residual(fma(load(x + n - w, a[0]) - a[0], a[1], a[2]), residual, n - w))
    if i and flow.stream:
        store(y, first, False)
    for k in range((n - i) // w):
        if flow.ahead:
            gn_prefetch(<const char *> (x + i + k * w) + flow.ahead)
        store(y + i + k * w, activated(activation, add_residual(fma(load(x + i + k * w, a[0]) - a[0], a[1], a[2]),
                                                                residual, i + k * w)), flow.stream)
    if i and not flow.stream:
        store(y, first, False)
    if (n - i) % w:
        store(y + n - w, last, False)


cdef inline void affine_runs_as(const stored *x, const stored *residual, stored *y, const Runs *t, int activation,
                                Flow flow, vec like) noexcept nogil:
    cdef vec a[3]
    cdef Py_ssize_t c
    a[0] = all_of(t.mean, like)
    for c in range(t.channels):
        a[1] = all_of(t.scale[c], like)
        a[2] = all_of(t.shift[c], like)
        affine_run(x + c * t.xstep, residual if residual == NULL else residual + c * t.rstep, y + c * t.ystep,
                   t.values, a, activation, flow)


cdef void affine_runs(const stored *x, const stored *residual, stored *y, const Runs *t, int activation,
                      vec like) noexcept nogil:
    cdef Flow plain
    plain.stream = False
    plain.ahead = 0
    if activation == IDENTITY and residual == NULL and not t.flow.stream and not t.flow.ahead:
        affine_runs_as(x, NULL, y, t, IDENTITY, plain, like)  # from a cache: here each test would tell
    elif activation == IDENTITY:
        affine_runs_as(x, residual, y, t, IDENTITY, t.flow, like)
    elif activation == RELU:
        affine_runs_as(x, residual, y, t, RELU, t.flow, like)
    elif activation == SILU:
        affine_runs_as(x, residual, y, t, SILU, t.flow, like)
    elif activation == GELU:
        affine_runs_as(x, residual, y, t, GELU, t.flow, like)
    elif activation == GELU_TANH:
        affine_runs_as(x, residual, y, t, GELU_TANH, t.flow, like)
    else:
        affine_runs_as(x, residual, y, t, MISH, t.flow, like)


cdef inline vec dx_at(vec x, vec dy, const vec *a) noexcept nogil:
    return fma(dy, a[1], fma(x - a[0], a[2], a[3]))


cdef inline void dx_run(const stored *x, const stored *dy, stored *dx, Py_ssize_t n, const vec *a,
                        Flow flow) noexcept nogil:
    """As affine_run."""
    cdef Py_ssize_t w = width(a[0]), i, k
    cdef vec first = a[0], last = a[0]
    if n < w:
        store_some(dx, dx_at(load_some(x, n, a[0]), load_some(dy, n, a[0]), a), n)
        return
    i = before_vector(dx, a[0])
    if i:
        first = dx_at(load(x, a[0]), load(dy, a[0]), a)
    if (n - i) % w:
        last = dx_at(load(x + n - w, a[0]), load(dy + n - w, a[0]), a)
    if i and flow.stream:
        store(dx, first, False)
    for k in range((n - i) // w):
        if flow.ahead:
            gn_prefetch(<const char *> (x + i + k * w) + flow.ahead)
            gn_prefetch(<const char *> (dy + i + k * w) + flow.ahead)
        store(dx + i + k * w, dx_at(load(x + i + k * w, a[0]), load(dy + i + k * w, a[0]), a), flow.stream)
    if i and not flow.stream:
        store(dx, first, False)
    if (n - i) % w:
        store(dx + n - w, last, False)


cdef void dx_runs(const stored *x, const stored *dy, stored *dx, const Runs *t, vec like) noexcept nogil:
    cdef vec a[4]
    cdef Flow plain
    cdef Py_ssize_t c
    plain.stream = False
    plain.ahead = 0
    a[0] = all_of(t.mean, like)
    a[2] = all_of(-t.slope, like)
    a[3] = all_of(-t.constant, like)
    for c in range(t.channels):
        a[1] = all_of(t.scale[c], like)
        if t.flow.stream or t.flow.ahead:
            dx_run(x + c * t.xstep, dy + c * t.rstep, dx + c * t.ystep, t.values, a, t.flow)
        else:
            dx_run(x + c * t.xstep, dy + c * t.rstep, dx + c * t.ystep, t.values, a, plain)


# ---- rows ------------------------------------------------------------------------------------------


cdef inline void affine_band(const stored *x, const stored *residual, stored *y, const Grid *t, Py_ssize_t rows,
                             int activation, vec like) noexcept nogil:
    """Some rows, for which the parameters are loaded once."""
    cdef Py_ssize_t w = width(like), whole = t.lanes // w, rest = t.lanes % w, j = 0, k, r
    cdef vec mean, scale, shift, z
    for k in range(whole):
        mean = lane(t.mean, j, like)
        scale = lane(t.scale, j, like)
        shift = lane(t.shift, j, like)
        for r in range(rows):
            if t.flow.ahead:
                gn_prefetch(<const char *> (x + (k * rows + r) * w) + t.flow.ahead)
            z = fma(load(x + r * t.xrow + j, like) - mean, scale, shift)
            store(y + r * t.yrow + j, activated(activation, add_residual(z, residual, r * t.rrow + j)), t.flow.stream)
        j += w
    if rest:
        mean = lane(t.mean, j, like)
        scale = lane(t.scale, j, like)
        shift = lane(t.shift, j, like)
        for r in range(rows):
            z = fma(load_some(x + r * t.xrow + j, rest, like) - mean, scale, shift)
            if residual != NULL:
                z = z + load_some(residual + r * t.rrow + j, rest, like)
            store_some(y + r * t.yrow + j, activated(activation, z), rest)


cdef inline void affine_rows_as(const stored *x, const stored *residual, stored *y, const Grid *t, int activation,
                                vec like) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(t.rows // 4):
        affine_band(x, residual, y, t, 4, activation, like)
        x += 4 * t.xrow
        y += 4 * t.yrow
        residual = residual if residual == NULL else residual + 4 * t.rrow
    for r in range(t.rows % 4):
        affine_band(x, residual, y, t, 1, activation, like)
        x += t.xrow
        y += t.yrow
        residual = residual if residual == NULL else residual + t.rrow


cdef void affine_rows(const stored *x, const stored *residual, stored *y, const Grid *t, int activation,
                      vec like) noexcept nogil:
    if activation == IDENTITY and residual == NULL:
        affine_rows_as(x, NULL, y, t, IDENTITY, like)
    elif activation == IDENTITY:
        affine_rows_as(x, residual, y, t, IDENTITY, like)
    elif activation == RELU:
        affine_rows_as(x, residual, y, t, RELU, like)
    elif activation == SILU:
        affine_rows_as(x, residual, y, t, SILU, like)
    elif activation == GELU:
        affine_rows_as(x, residual, y, t, GELU, like)
    elif activation == GELU_TANH:
        affine_rows_as(x, residual, y, t, GELU_TANH, like)
    else:
        affine_rows_as(x, residual, y, t, MISH, like)


cdef inline void dx_band(const stored *x, const stored *dy, stored *dx, const Grid *t, Py_ssize_t rows,
                         vec like) noexcept nogil:
    cdef Py_ssize_t w = width(like), rest = t.lanes % w, j = 0, k, r
    cdef vec a[4]
    for k in range((t.lanes + w - 1) // w):
        a[0] = lane(t.mean, j, like)
        a[1] = lane(t.scale, j, like)
        a[2] = lane(t.slope, j, like)
        a[3] = lane(t.constant, j, like)
        if j + w <= t.lanes:
            for r in range(rows):
                store(dx + r * t.yrow + j, dx_at(load(x + r * t.xrow + j, like), load(dy + r * t.rrow + j, like), a),
                      t.flow.stream)
        else:
            for r in range(rows):
                store_some(dx + r * t.yrow + j, dx_at(load_some(x + r * t.xrow + j, rest, like),
                                                      load_some(dy + r * t.rrow + j, rest, like), a), rest)
        j += w


cdef void dx_rows(const stored *x, const stored *dy, stored *dx, const Grid *t, vec like) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(t.rows // 4):
        dx_band(x, dy, dx, t, 4, like)
        x += 4 * t.xrow
        dy += 4 * t.rrow
        dx += 4 * t.yrow
    for r in range(t.rows % 4):
        dx_band(x, dy, dx, t, 1, like)
        x += t.xrow
        dy += t.rrow
        dx += t.yrow


# ---- values ----------------------------------------------------------------------------------------


cdef inline void affine_values_as(const stored *x, const stored *residual, stored *y, const Values *t, int activation,
                                  vec like) noexcept nogil:
    cdef vec mean, rstd, rest, z
    cdef Py_ssize_t w = width(like), n = t.values, i = 0, k, g
    for g in range(t.groups):
        mean = all_of(t.mean[g], like)
        rstd = all_of(t.rstd[g], like)
        rest = all_of(t.rest[g], like)
        for k in range(n // w):
            z = fma(fma(load(x + i, like) - mean, rstd, rest), lane(t.weight, i, like), lane(t.bias, i, like))
            store(y + i, activated(activation, add_residual(z, residual, i)), False)
            i += w
        if n % w:
            z = fma(fma(load_some(x + i, n % w, like) - mean, rstd, rest), some_lanes(t.weight, i, n % w, like),
                    some_lanes(t.bias, i, n % w, like))
            if residual != NULL:
                z = z + load_some(residual + i, n % w, like)
            store_some(y + i, activated(activation, z), n % w)
            i += n % w


cdef void affine_values(const stored *x, const stored *residual, stored *y, const Values *t, int activation,
                        vec like) noexcept nogil:
    if activation == IDENTITY and residual == NULL:
        affine_values_as(x, NULL, y, t, IDENTITY, like)
    elif activation == IDENTITY:
        affine_values_as(x, residual, y, t, IDENTITY, like)
    elif activation == RELU:
        affine_values_as(x, residual, y, t, RELU, like)
    elif activation == SILU:
        affine_values_as(x, residual, y, t, SILU, like)
    elif activation == GELU:
        affine_values_as(x, residual, y, t, GELU, like)
    elif activation == GELU_TANH:
        affine_values_as(x, residual, y, t, GELU_TANH, like)
    else:
        affine_values_as(x, residual, y, t, MISH, like)


cdef void dx_values(const stored *x, const stored *dy, stored *dx, const Values *t, vec like) noexcept nogil:
    cdef vec a[4]
    cdef Py_ssize_t w = width(like), n = t.values, i = 0, k, g
    for g in range(t.groups):
        a[0] = all_of(t.mean[g], like)
        a[2] = all_of(-t.slope[g], like)
        a[3] = all_of(-t.constant[g], like)
        for k in range(n // w):
            a[1] = lane(t.weight, i, like) * all_of(t.rstd[g], like)
            store(dx + i, dx_at(load(x + i, like), load(dy + i, like), a), False)
            i += w
        if n % w:
            a[1] = some_lanes(t.weight, i, n % w, like) * all_of(t.rstd[g], like)
            store_some(dx + i, dx_at(load_some(x + i, n % w, like), load_some(dy + i, n % w, like), a), n % w)
            i += n % w


# ---- the activation's gradient ---------------------------------------------------------------------


cdef inline void activate_gradient_as(int kind, const void *z, void *dy, Py_ssize_t n, vec like) noexcept nogil:
    cdef Py_ssize_t w = width(like), i = 0, k
    for k in range(n // w):
        put_lane(dy, i, dy_before(kind, lane(z, i, like), lane(dy, i, like)))
        i += w
    if n % w:
        put_some_lanes(dy, i, dy_before(kind, some_lanes(z, i, n % w, like), some_lanes(dy, i, n % w, like)), n % w)


cdef void activate_gradient(int kind, const void *z, void *dy, Py_ssize_t n, vec like) noexcept nogil:
    """dy <- dy * act'(z), on tiles of the compute type."""
    if kind == RELU:
        activate_gradient_as(RELU, z, dy, n, like)
    elif kind == SILU:
        activate_gradient_as(SILU, z, dy, n, like)
    elif kind == GELU:
        activate_gradient_as(GELU, z, dy, n, like)
    elif kind == GELU_TANH:
        activate_gradient_as(GELU_TANH, z, dy, n, like)
    elif kind == MISH:
        activate_gradient_as(MISH, z, dy, n, like)

# The pair of sums that everything is made of, in one piece of code: sum(v) and sum(v * d) with d = x - p. The moments
# are those of v = d about a pivot p near the mean, the gradient's those of v = dy' about the mean.
#
# They are taken in LANES lanes of the compute type, as few values to a chain that only few roundings meet, and from
# there added up in float64: `sums` has LANES of sum(v), then LANES of sum(v * d).

cdef enum:
    LANES = 16
    SETS = 4  # of lanes: chains that run side by side
    PIECE = 4 * SETS * LANES  # values that are added up before they go to float64: six roundings in a row
    STEP = 16  # rows of channels-last, likewise


cdef inline vec factor(const stored *v, Py_ssize_t i, vec d) noexcept nogil:
    """dy', or d itself where there is none."""
    return d if v == NULL else load(v + i, d)


cdef inline void add_pair(vec v, vec d, vec *sum, vec *product) noexcept nogil:
    sum[0] = sum[0] + v
    product[0] = fma(v, d, product[0])


cdef inline void sum_lanes(const stored *x, const stored *v, Py_ssize_t rows, vec p, vec *sum,
                           vec *product) noexcept nogil:
    """Rows of LANES values, in the order of memory as far as a vector reaches: out of order the hardware prefetches too
    little of it, and a sweep of DRAM takes up to 2.4 times as long."""
    cdef vec s[SETS]
    cdef vec q[SETS]
    cdef vec d
    cdef Py_ssize_t k, r, j, i
    for k in range(LANES // width(p)):
        i = k * width(p)
        for j in range(SETS):
            s[j] = q[j] = all_of(0, p)
        for r in range(rows // SETS):
            for j in range(SETS):
                d = load(x + i + j * LANES, p) - p
                add_pair(factor(v, i + j * LANES, d), d, &s[j], &q[j])
            i += SETS * LANES
        for r in range(rows % SETS):
            d = load(x + i, p) - p
            add_pair(factor(v, i, d), d, &s[0], &q[0])
            i += LANES
        sum[k] = s[0]
        product[k] = q[0]
        if rows >= SETS:
            sum[k] = (s[0] + s[1]) + (s[2] + s[3])
            product[k] = (q[0] + q[1]) + (q[2] + q[3])


cdef inline void add_piece(const stored *x, const stored *v, Py_ssize_t rows, vec p, double *sums) noexcept nogil:
    cdef vec sum[LANES]
    cdef vec product[LANES]
    cdef Py_ssize_t k
    sum_lanes(x, v, rows, p, sum, product)
    for k in range(LANES // width(p)):
        add_lanes(sums + k * width(p), sum[k])
        add_lanes(sums + LANES + k * width(p), product[k])


cdef inline void add_few(const stored *x, Py_ssize_t n, double pivot, double *sums) noexcept nogil:
    """The same of few values, in float64: a chain for each lane will do, and the lanes are written once."""
    cdef doubles p = gn_all_doubles(pivot), d
    cdef doubles sum[LANES]
    cdef doubles product[LANES]
    cdef Py_ssize_t k, r
    for k in range(LANES // DOUBLES):
        sum[k] = product[k] = gn_all_doubles(0)
    for r in range(n // LANES):
        for k in range(LANES // DOUBLES):
            d = load(x + k * DOUBLES, p) - p
            add_pair(d, d, &sum[k], &product[k])
        x += LANES
    for k in range(LANES // DOUBLES):
        gn_doubles_to_double(sums + k * DOUBLES, sum[k], False)
        gn_doubles_to_double(sums + LANES + k * DOUBLES, product[k], False)
    for r in range(n % LANES):
        sums[r] += scalar(x[r]) - pivot
        sums[LANES + r] += (scalar(x[r]) - pivot) * (scalar(x[r]) - pivot)


cdef inline void add_rest(const stored *x, const stored *v, Py_ssize_t n, double pivot, double *sum,
                          double *product) noexcept nogil:
    """A value for each of the first lanes."""
    cdef Py_ssize_t j
    cdef double d
    for j in range(n):
        d = scalar(x[j]) - pivot
        sum[j] += d if v == NULL else scalar(v[j])
        product[j] += d * (d if v == NULL else scalar(v[j]))


cdef inline void add_values(const stored *x, const stored *v, Py_ssize_t n, vec p, double pivot,
                            double *sums) noexcept nogil:
    """Values that lie in a row, piece by piece."""
    cdef Py_ssize_t k
    for k in range(n // PIECE):
        add_piece(x, v, PIECE // LANES, p, sums)
        x += PIECE
        v = after(v, PIECE)
    n %= PIECE
    add_piece(x, v, n // LANES, p, sums)
    k = n - n % LANES
    add_rest(x + k, after(v, k), n % LANES, pivot, sums, sums + LANES)


cdef inline void sum_channel(const stored *x, const stored *v, Py_ssize_t n, vec p, double pivot, double *sum,
                             double *product) noexcept nogil:
    """Of a channel, which may be a single piece."""
    cdef double lanes[2 * LANES]
    cdef vec s[LANES]
    cdef vec q[LANES]
    cdef Py_ssize_t k, j
    cdef double d
    gn_assume(v != NULL)
    if vec is floats and n < PIECE:
        k = n - n % LANES
        sum_lanes(x, v, n // LANES, p, s, q)
        gn_total_floats(s, q, sum, product)
        for j in range(k, n):
            d = scalar(x[j]) - pivot
            sum[0] += scalar(v[j])
            product[0] += d * scalar(v[j])
        return
    memset(lanes, 0, sizeof(lanes))
    add_values(x, v, n, p, pivot, lanes)
    gn_total(lanes, sum, product)


cdef struct Rows:  # of channels-last: values of some lanes, `row` apart
    Py_ssize_t row, dyrow, rows, lanes
    const void *pivot  # of each lane, in the compute type
    double *sum  # of each lane
    double *product
    double *sum_low  # what rounding left out of these, of float64
    double *product_low
    Py_ssize_t ahead


cdef inline void add_lanes_exactly(double *sums, double *low, doubles v) noexcept nogil:
    """Add to sums and keep what rounding leaves out (Neumaier 1974, in the form of Knuth, TAOCP 2, 4.2.2)."""
    cdef doubles before = gn_doubles_of_double(sums), sum = before + v, part = sum - before
    gn_doubles_to_double(sums, sum, False)
    gn_add_doubles(low, (before - (sum - part)) + (v - part))


cdef inline void add_step_sums(const stored *v, const Rows *t, Py_ssize_t j, vec sum, vec product) noexcept nogil:
    if stored is double and vec is doubles and v == NULL:  # a mean's error would count in full, a gradient's does not
        add_lanes_exactly(t.sum + j, t.sum_low + j, sum)
        add_lanes_exactly(t.product + j, t.product_low + j, product)
    else:
        add_lanes(t.sum + j, sum)
        add_lanes(t.product + j, product)


cdef inline void add_down(const stored *x, const stored *dy, const Rows *t, Py_ssize_t rows, Py_ssize_t j, Py_ssize_t n,
                          vec like) noexcept nogil:
    """Down some rows of a vector's lanes, of which n are there. Even and odd rows are added up side by side."""
    cdef vec p = some_lanes(t.pivot, j, n, like)
    cdef vec sum[2]
    cdef vec product[2]
    cdef vec d
    cdef Py_ssize_t r, k
    sum[0] = sum[1] = product[0] = product[1] = all_of(0, like)
    for r in range(rows if t.ahead else 0):  # several rows at once are out of the order of memory: ask for them in that order
        gn_prefetch(<const char *> (x + j * rows + r * n) + t.ahead)
    x += j
    dy = after(dy, j)
    for r in range(rows // 2):
        for k in range(2):
            d = some_of(x, n, like) - p
            add_pair(d if dy == NULL else some_of(dy, n, like), d, &sum[k], &product[k])
            x += t.row
            dy = after(dy, t.dyrow)
    if rows % 2:
        d = some_of(x, n, like) - p
        add_pair(d if dy == NULL else some_of(dy, n, like), d, &sum[0], &product[0])
    add_step_sums(dy, t, j, sum[0] + sum[1], product[0] + product[1])


cdef inline void add_step(const stored *x, const stored *v, const Rows *t, Py_ssize_t rows, vec like) noexcept nogil:
    cdef Py_ssize_t k, w = width(like), whole = t.lanes // w
    for k in range(whole):
        add_down(x, v, t, rows, k * w, w, like)
    if t.lanes % w:
        add_down(x, v, t, rows, whole * w, t.lanes % w, like)


cdef inline void add_rows(const stored *x, const stored *v, const Rows *t, vec like) noexcept nogil:
    """Rows, STEP at a time and at last up to twice as many, down each lane."""
    cdef Py_ssize_t left = t.rows
    while left >= 2 * STEP:
        add_step(x, v, t, STEP, like)
        x += STEP * t.row
        v = after(v, STEP * t.dyrow)
        left -= STEP
    if left == STEP:
        add_step(x, v, t, STEP, like)
    elif left:
        add_step(x, v, t, left, like)

# The moments of a chunk, in one pass: blocks summed in lanes about a pivot, merged by Chan's update; and the
# planar walk. That of channels-last lives in interleaved.pxi, what is done with the moments in affine.pxi.


cdef inline void merge_one(double count, double other_count, double share, double *into, const double *other, Py_ssize_t n) noexcept nogil:
    """Chan, Golub and LeVeque (1983): the moments of two sets from the moments of each; `share` is the other's."""
    cdef double delta
    into[PIVOT * n] = other[PIVOT * n] if count == 0 else into[PIVOT * n]
    delta = (other[PIVOT * n] - into[PIVOT * n]) + (other[SHIFT * n] - into[SHIFT * n])
    delta = delta if other_count > 0 else 0
    into[SHIFT * n] += delta * share
    into[M2 * n] += other[M2 * n] + delta * delta * (count * share)
    into[COUNT * n] = count + other_count


cdef void merge(double *into, const double *other, Py_ssize_t n) noexcept nogil:
    """Merge n sets with n others."""
    cdef double count, other_count
    cdef Py_ssize_t i
    for i in range(n):
        count = into[COUNT * n + i]
        other_count = other[COUNT * n + i]
        merge_one(count, other_count, other_count / max(count + other_count, 1.0), into + i, other + i, n)


cdef void merge_alike(double *into, const double *other, Py_ssize_t n) noexcept nogil:
    """The same if all n have one count and all others one: without n divisions."""
    cdef double count = into[COUNT * n], other_count = other[COUNT * n], share = other_count / max(count + other_count, 1.0)
    cdef Py_ssize_t i
    for i in range(n):
        merge_one(count, other_count, share, into + i, other + i, n)


cdef inline void accumulate(const real *x, Py_ssize_t n, real p, double *sum1, double *sum2) noexcept nogil:
    """sum(x - p) and sum((x - p)^2) of n <= TILE values that lie in a row. Each step takes eight to a lane, in the order
    of memory: out of order the hardware prefetches too little of it, and a sweep of DRAM takes 1.3 times as long. The
    next step takes other lanes, so that few roundings make a chain."""
    cdef real s1[LANES]
    cdef real s2[LANES]
    cdef real d0, d1, d2, d3, d4, d5, d6, d7
    cdef Py_ssize_t rows = n // VECTOR, r, i, j
    for j in range(LANES):
        s1[j] = 0
        s2[j] = 0
    for j in range(n % VECTOR):  # what does not fill a step comes first, while the sums are small
        d0 = x[rows * VECTOR + j] - p
        s1[j] += d0
        s2[j] += d0 * d0
    for r in range(rows % 8):
        i = r * VECTOR % LANES
        for j in range(VECTOR):
            d0 = x[j] - p
            s1[i + j] += d0
            s2[i + j] += d0 * d0
        x += VECTOR
    for r in range(rows // 8):
        i = r * VECTOR % LANES
        for j in range(VECTOR):
            d0 = x[j] - p
            d1 = x[j + VECTOR] - p
            d2 = x[j + 2 * VECTOR] - p
            d3 = x[j + 3 * VECTOR] - p
            d4 = x[j + 4 * VECTOR] - p
            d5 = x[j + 5 * VECTOR] - p
            d6 = x[j + 6 * VECTOR] - p
            d7 = x[j + 7 * VECTOR] - p
            s1[i + j] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
            s2[i + j] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))
        x += 8 * VECTOR
    sum1[0] = total[real](s1, LANES)
    sum2[0] = total[real](s2, LANES)


cdef inline void lane_means(const real *x, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t lanes, real *mean, real *size) noexcept nogil:
    """The means of x and of |x| down each lane."""
    cdef real share = <real> 1 / <real> rows  # multiplied first: the sum could overflow
    cdef real v0, v1, v2, v3
    cdef Py_ssize_t r, j
    for j in range(lanes):
        mean[j] = 0
        size[j] = 0
    for r in range(rows // 4):
        for j in range(lanes):
            v0 = x[j] * share
            v1 = x[row + j] * share
            v2 = x[2 * row + j] * share
            v3 = x[3 * row + j] * share
            mean[j] += (v0 + v1) + (v2 + v3)
            size[j] += (abs(v0) + abs(v1)) + (abs(v2) + abs(v3))
        x += 4 * row
    for r in range(rows % 4):
        for j in range(lanes):
            v0 = x[j] * share
            mean[j] += v0
            size[j] += abs(v0)
        x += row


cdef inline real on_grid(real p, real size) noexcept nogil:
    """A pivot rounded to the spacing of numbers four times as large as the data: then x - p is exact or its error is
    random. With lower bits of its own, it would shift all x of one binade by the same error, which no average removes."""
    cdef real above = 4 * size if size < <real> 1e37 else <real> 0
    return (p + above) - above


cdef inline double total(const real *v, Py_ssize_t n) noexcept nogil:
    """The sum of some values, in eight lanes."""
    cdef double part[8]
    cdef Py_ssize_t i, j
    for j in range(8):
        part[j] = 0
    for i in range(0, n - 7, 8):
        for j in range(8):
            part[j] += v[i + j]
    for j in range(n & ~7, n):
        part[j & 7] += v[j]
    for j in range(4):
        part[j] += part[j + 4]
    return (part[0] + part[2]) + (part[1] + part[3])


cdef inline void add_about(double x, double pivot, double *sum, double *error) noexcept nogil:
    cdef double d = x - pivot, z = d - x, t
    error[0] += (x - (d - z)) - (pivot + z)
    t = sum[0] + d
    z = t - sum[0]
    error[0] += (sum[0] - (t - z)) + (d - z)
    sum[0] = t


cdef double sum_about(const real *x, Py_ssize_t n, double pivot) noexcept nogil:
    """sum(x - pivot) as if in twice the precision: Ogita, Rump and Oishi (2005), algorithm 4.4, over 8 lanes."""
    cdef double sum[8]
    cdef double error[8]
    cdef double t, z
    cdef Py_ssize_t i = 0, j, m
    for j in range(8):
        sum[j] = error[j] = 0
    while i < n:
        m = 8 if n - i >= 8 else n - i  # a constant 8 is vectorised
        if m == 8:
            for j in range(8):
                add_about(x[i + j], pivot, &sum[j], &error[j])
        else:
            for j in range(m):
                add_about(x[i + j], pivot, &sum[j], &error[j])
        i += m
    for j in range(1, 8):
        t = sum[0] + sum[j]
        z = t - sum[0]
        error[0] += ((sum[0] - (t - z)) + (sum[j] - z)) + error[j]
        sum[0] = t
    return sum[0] + error[0]


cdef inline bint lossy(double sum_of_squares) noexcept nogil:
    """Whether squares may have under- or overflowed in float32 (in float64 the same bounds do no harm)."""
    return not 8e-28 < sum_of_squares < 1e36


cdef inline double power_near(double v) noexcept nogil:
    """The power of two at or below v, where float32 has it and its inverse."""
    return min(max(gn_power_of_two(v), 2.0 ** -126), 2.0 ** 126)


cdef inline Py_ssize_t select(const real *x, const uint8_t *mask, Py_ssize_t n, real other, real *copy) noexcept nogil:
    """Copy the values that count, and another for those that don't; return how many do."""
    cdef int count = 0
    cdef Py_ssize_t j
    for j in range(n):
        copy[j] = x[j] if mask[j] != 0 else other
        count += mask[j] != 0
    return count


cdef inline real planar_pivot(const real *x, const uint8_t *mask, Py_ssize_t n, real *copy, real *size) noexcept nogil:
    """About the mean of a tile: of its first values or, with a mask, of those that count. Also the mean of |x|."""
    cdef real mean[LANES]
    cdef Py_ssize_t lanes = min(n, LANES), j
    cdef double count
    cdef real pivot
    if mask == NULL:
        lane_means[real](x, lanes, min(n // lanes, PIVOT_ROWS), lanes, mean, copy)
        size[0] = <real> (total[real](copy, lanes) / lanes)
        return on_grid[real](<real> (total[real](mean, lanes) / lanes), size[0])
    count = max(select[real](x, mask, n, 0, copy), 1)
    pivot = <real> (total[real](copy, n) / count)
    for j in range(n):
        copy[j] = abs(copy[j])
    size[0] = <real> (total[real](copy, n) / count)
    return on_grid[real](pivot, size[0])


cdef void planar_block(const real *x, const uint8_t *mask, Py_ssize_t n, real pivot, real *copy, double *moments, bint exact) noexcept nogil:
    """The moments of n <= TILE values of one group; where the mask is 0 they do not count."""
    cdef Py_ssize_t j
    cdef double count = n, sum1 = 0, sum2 = 0
    cdef real power = 1, big = 0
    if mask != NULL:
        count = select[real](x, mask, n, pivot, copy)
        x = copy
    while True:
        accumulate[real](x, n, pivot, &sum1, &sum2)
        if power != 1 or not lossy(sum2):
            break
        big = max(pivot, -pivot)
        for j in range(n):  # rare: once more, with the values brought near 1
            big = max(big, max(x[j], -x[j]))
        power = <real> power_near(big)
        if power == 1:
            break
        for j in range(n):
            copy[j] = x[j] / power
        x = copy
        pivot = pivot / power
    if exact and not lossy(sum2):
        sum1 = sum_about[real](x, n, pivot)
    moments[COUNT] = count
    moments[PIVOT] = <double> pivot * power
    moments[SHIFT] = sum1 / max(count, 1.0) * power
    moments[M2] = (sum2 - sum1 * (sum1 / max(count, 1.0))) * power * power


cdef void planar_moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *found, real _) noexcept nogil:
    cdef real xtile[TILE]
    cdef uint8_t mtile[TILE]
    cdef real copy[TILE]
    cdef double block[4]
    cdef Py_ssize_t pos, stop, row
    cdef real pivot = 0, next_pivot = 0, size = 0
    cdef const real *x
    cdef const uint8_t *mask
    cdef Unit u = unit_of(job, unit)
    cdef Span t
    bounds(job, chunk, &pos, &stop)
    t.n = u.n
    t.rows = 1
    t.planar = True
    while pos < stop:
        t.c = u.c + pos // job.S
        t.s = pos % job.S
        t.lanes = min(stop - pos, TILE)
        x = load[real](job, &job.x, &t, xtile, &row)
        mask = load_mask(job, t, t.lanes, mtile)
        if found[COUNT] == 0:  # so far nothing was seen, or all of it masked
            pivot = next_pivot = planar_pivot[real](x, mask, t.lanes, copy, &size)
        planar_block[real](x, mask, t.lanes, pivot, copy, block, False)
        merge(found, block, 1)
        # The mean of this block is the pivot of the block after the next: the next one need not wait for it.
        pivot = next_pivot
        next_pivot = on_grid[real](<real> (block[PIVOT] + block[SHIFT]), size)
        pos += t.lanes


cdef void small_moments(const Job *job, Py_ssize_t unit, double *found) noexcept nogil:
    """The moments of groups of fewer than SMALL values, in either layout, in float64: so few float32 roundings do not
    average out."""
    cdef double xtile[SMALL]
    cdef uint8_t mtile[SMALL]
    cdef double copy[SMALL]
    cdef double block[4]
    cdef double pivot, size = 0
    cdef const uint8_t *mask
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t g, field
    cdef Span t
    t.n = u.n
    t.s = 0
    t.rows = 1
    t.planar = True
    t.lanes = job.K * job.S
    for g in range(u.groups):
        t.c = u.c + g * job.K
        move[double](job, &job.x, &t, xtile, False)
        mask = load_mask(job, t, t.lanes, mtile)
        pivot = xtile[0]  # within sqrt(SMALL) standard deviations of the mean, unless float32 is too short for that
        if mask != NULL or job.x.storage == FLOAT64:
            pivot = planar_pivot[double](xtile, mask, t.lanes, copy, &size)
        planar_block[double](xtile, mask, t.lanes, pivot, copy, block, job.x.storage == FLOAT64)
        for field in range(4):
            found[field * u.groups + g] = block[field]

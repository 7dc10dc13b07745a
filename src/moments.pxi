# The moments of a chunk, in one pass: blocks summed in lanes about a pivot, merged by Chan's update; and the
# planar walk. That of channels-last lives in interleaved.pxi, what is done with the moments in affine.pxi.


cdef void merge(double *into, const double *other, Py_ssize_t n) noexcept nogil:
    """Merge n sets with n others: Chan, Golub and LeVeque (1983)."""
    cdef double count, other_count, share, delta
    cdef Py_ssize_t i
    for i in range(n):
        count = into[COUNT * n + i]
        other_count = other[COUNT * n + i]
        share = other_count / max(count + other_count, 1.0)
        into[PIVOT * n + i] = other[PIVOT * n + i] if count == 0 else into[PIVOT * n + i]
        delta = (other[PIVOT * n + i] - into[PIVOT * n + i]) + (other[SHIFT * n + i] - into[SHIFT * n + i])
        delta = delta if other_count > 0 else 0
        into[SHIFT * n + i] += delta * share
        into[M2 * n + i] += other[M2 * n + i] + delta * delta * (count * share)
        into[COUNT * n + i] = count + other_count


ctypedef fused lane:  # what a step adds up: values of the compute type, or several at once
    float
    double
    floats


cdef inline void add_eight(lane d0, lane d1, lane d2, lane d3, lane d4, lane d5, lane d6, lane d7, lane *sum, lane *squares) noexcept nogil:
    sum[0] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
    squares[0] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))


# A step is eight values to a lane, in the order of memory: out of order the hardware prefetches too little of it, and a
# sweep of DRAM takes 1.3 times as long.

cdef inline void accumulate_step(const real *x, real p, real *sums) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(VECTOR):
        add_eight[real](x[j] - p, x[j + VECTOR] - p, x[j + 2 * VECTOR] - p, x[j + 3 * VECTOR] - p, x[j + 4 * VECTOR] - p,
                        x[j + 5 * VECTOR] - p, x[j + 6 * VECTOR] - p, x[j + 7 * VECTOR] - p, &sums[j], &sums[VECTOR + j])


cdef inline void accumulate_step_of_16_bits(const stored *x, float p, float *sums) noexcept nogil:
    cdef floats sum, squares
    cdef Py_ssize_t k
    for k in range(VECTOR // FLOATS):
        memcpy(&sum, sums, sizeof(floats))
        memcpy(&squares, sums + VECTOR, sizeof(floats))
        add_eight[floats](floats_at(x) - p, floats_at(x + VECTOR) - p, floats_at(x + 2 * VECTOR) - p,
                          floats_at(x + 3 * VECTOR) - p, floats_at(x + 4 * VECTOR) - p, floats_at(x + 5 * VECTOR) - p,
                          floats_at(x + 6 * VECTOR) - p, floats_at(x + 7 * VECTOR) - p, &sum, &squares)
        memcpy(sums, &sum, sizeof(floats))
        memcpy(sums + VECTOR, &squares, sizeof(floats))
        x += FLOATS
        sums += FLOATS


cdef inline const real *widened(const stored *x, Py_ssize_t n, real *copy) noexcept nogil:
    """Values in the compute type: where they lie, or in a copy."""
    if sizeof(stored) == sizeof(real):
        return <const real *> x
    widen[stored, real](x, copy, n)
    return copy


cdef inline void accumulate(const stored *memory, Py_ssize_t n, real p, double *sums) noexcept nogil:
    """Add sum(x - p) and sum((x - p)^2) of values that lie in a row to VECTOR lanes each. Those of a piece are summed in
    the compute type: six roundings in a chain at most, if the piece is whole."""
    cdef real copy[PIECE]
    cdef real part[2 * VECTOR]
    cdef real d
    cdef const real *x
    cdef Py_ssize_t r, j
    while n > 0:
        for j in range(2 * VECTOR):
            part[j] = 0
        if n >= PIECE and FLOATS > 1 and sizeof(stored) == 2:  # one by one they would be slower than from a copy
            for r in range(PIECE // STEP):
                accumulate_step_of_16_bits[stored](memory + r * STEP, <float> p, <float *> part)
        elif n >= PIECE:
            x = widened[stored, real](memory, PIECE, copy)
            for r in range(PIECE // STEP):
                accumulate_step[real](x + r * STEP, p, part)
        else:
            x = widened[stored, real](memory, n, copy)
            for r in range(n // STEP):
                accumulate_step[real](x, p, part)
                x += STEP
            for r in range(n % STEP // VECTOR):
                for j in range(VECTOR):
                    d = x[j] - p
                    part[j] += d
                    part[VECTOR + j] += d * d
                x += VECTOR
            for j in range(n % VECTOR):
                d = x[j] - p
                part[j] += d
                part[VECTOR + j] += d * d
        for j in range(2 * VECTOR):  # more than 16 steps in one loop: GCC would unroll a shorter one, and not vectorise it
            sums[j] += part[j]
        memory += PIECE
        n -= PIECE


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
    cdef Py_ssize_t i, j, k
    memset(part, 0, sizeof(part))
    for i in range(n // 8):
        for k in range(8 // LANES):
            put_lanes(part + k * LANES, lanes_at(part + k * LANES) + lanes_at(v + k * LANES))
        v += 8
    for j in range(n % 8):
        part[j] += v[j]
    return gn_total_of_eight(part)


cdef inline void add_about(double x, double pivot, double *sum, double *error) noexcept nogil:
    cdef double d = x - pivot, z = d - x, t
    error[0] += (x - (d - z)) - (pivot + z)
    t = sum[0] + d
    z = t - sum[0]
    error[0] += (sum[0] - (t - z)) + (d - z)
    sum[0] = t


cdef double sum_about(const double *x, Py_ssize_t n, double pivot) noexcept nogil:
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


cdef inline bint lossy(real sum_of_squares) noexcept nogil:
    """Whether squares may have under- or overflowed in float32 (in float64 the same bounds do no harm)."""
    return not <real> 8e-28 < sum_of_squares < <real> 1e36


cdef inline double power_near(double v) noexcept nogil:
    """The power of two at or below v, where float32 has it and its inverse."""
    return min(max(gn_power_of_two(v), 2.0 ** -126), 2.0 ** 126)


cdef inline void select(const real *x, const uint8_t *mask, Py_ssize_t n, real other, real *copy) noexcept nogil:
    """Copy the values that count, and another for those that don't."""
    cdef real v
    cdef Py_ssize_t j
    for j in range(n):
        v = x[j]  # whatever the mask says: a load that depends on it takes ten times as long
        copy[j] = v if mask[j] != 0 else other


cdef inline real planar_pivot(const real *x, const uint8_t *mask, Py_ssize_t n, real *copy, real *size) noexcept nogil:
    """About the mean of some values: of the first ones or, with a mask, of those that count. Also the mean of |x|."""
    cdef real mean[VECTOR]
    cdef Py_ssize_t lanes = min(n, VECTOR), j
    cdef double count
    cdef real pivot
    if mask == NULL:
        lane_means[real](x, lanes, PIVOT_ROWS if n >= PIVOT_ROWS * VECTOR else 1, lanes, mean, copy)
        size[0] = <real> (total[real](copy, lanes) / lanes)
        return on_grid[real](<real> (total[real](mean, lanes) / lanes), size[0])
    count = max(counted(mask, n), 1)
    select[real](x, mask, n, 0, copy)
    pivot = <real> (total[real](copy, n) / count)
    for j in range(n):
        copy[j] = abs(copy[j])
    size[0] = <real> (total[real](copy, n) / count)
    return on_grid[real](pivot, size[0])


cdef inline void put_moments(double count, double sum1, double sum2, double pivot, double power, double *moments) noexcept nogil:
    """From sums about a pivot, all of values divided by a power of two."""
    cdef double mean = sum1 / max(count, 1.0)
    moments[COUNT] = count
    moments[PIVOT] = pivot * power
    moments[SHIFT] = mean * power
    moments[M2] = (sum2 - sum1 * mean) * power * power


cdef inline bint plain_block(const stored *x, Py_ssize_t n, bint seen, real *pivot, real *size, double *moments) noexcept nogil:
    """The moments of values in a row, of one group, unless float32's range is too short for their squares. If no value
    of the group was `seen` before, this finds the pivot."""
    cdef real copy[PIECE]
    cdef real spare[PIECE]
    cdef double sums[2 * VECTOR]
    cdef double sum2
    if not seen:
        pivot[0] = planar_pivot[real](widened[stored, real](x, min(n, PIECE), copy), NULL, min(n, PIECE), spare, size)
    memset(sums, 0, sizeof(sums))
    accumulate[stored, real](x, n, pivot[0], sums)
    sum2 = total[double](sums + VECTOR, VECTOR)
    put_moments(n, total[double](sums, VECTOR), sum2, pivot[0], 1, moments)
    return not lossy(sum2)


cdef void planar_block(const Job *job, const Span *t, Py_ssize_t count, bint seen, real *pivot, real *size, double *moments) noexcept nogil:
    """The moments of any span of one group, of which so many values count: strided, masked or beyond float32's range."""
    cdef real buffer[BLOCK]
    cdef real copy[BLOCK]
    cdef uint8_t mbuffer[BLOCK]
    cdef double sums[2 * VECTOR]
    cdef double sum2
    cdef real power = 1, big
    cdef Py_ssize_t first = 0, i = 0, row, j, n
    cdef const real *x = load[real](job, &job.x, t, buffer, &row)
    cdef const uint8_t *mask = load_mask(job, t[0], t.lanes, mbuffer)
    if mask != NULL:
        while not seen and counted(mask + first, min(t.lanes - first, PIECE)) == 0:
            first += PIECE
    if not seen:
        pivot[0] = planar_pivot[real](x + first, mask + first if mask != NULL else NULL, min(t.lanes - first, PIECE), copy, size)
    memset(sums, 0, sizeof(sums))
    while i < t.lanes:  # piece by piece, so that memory is read while sums are taken
        n = min(t.lanes - i, PIECE)
        if mask != NULL:
            select[real](x + i, mask + i, n, pivot[0], copy + i)
        accumulate[real, real](x + i if mask == NULL else copy + i, n, pivot[0], sums)
        i += n
    sum2 = total[double](sums + VECTOR, VECTOR)
    if lossy(sum2):  # rare: once more, with the largest value brought near 1
        x = x if mask == NULL else copy
        big = abs(pivot[0])
        for j in range(t.lanes):
            big = max(big, abs(x[j]))
        power = <real> power_near(big)
        for j in range(t.lanes):
            copy[j] = x[j] / power
        memset(sums, 0, sizeof(sums))
        accumulate[real, real](copy, t.lanes, pivot[0] / power, sums)
        sum2 = total[double](sums + VECTOR, VECTOR)
    put_moments(count, total[double](sums, VECTOR), sum2, <double> pivot[0] / power, power, moments)


cdef void small_block(const Job *job, const Span *whole, double *moments) noexcept nogil:
    """The moments of a span, of one group, of which fewer than SMALL values count: in float64, as so few float32 roundings
    do not average out."""
    cdef double tile[SMALL]
    cdef double piece[SMALL]
    cdef uint8_t mbuffer[PIECE]
    cdef double sums[2 * VECTOR]
    cdef double pivot = 0, size = 0, sum1, sum2, power = 1
    cdef Py_ssize_t count = 0, j
    cdef const uint8_t *mask
    cdef bint exact = job.x.storage == FLOAT64
    cdef int attempt
    cdef Span t = whole[0]
    while t.lanes > 0:
        t.lanes = min(t.lanes, PIECE)
        mask = load_mask(job, t, t.lanes, mbuffer)
        if mask == NULL:
            move[double](job, &job.x, &t, tile + count, False)
            count += t.lanes
        elif counted(mask, t.lanes) > 0:
            move[double](job, &job.x, &t, piece, False)
            for j in range(t.lanes):
                if mask[j] != 0:
                    tile[count] = piece[j]
                    count += 1
        advance(job, whole, &t)
    if count > 0:  # any value is within sqrt(SMALL) standard deviations of the mean, unless float32 is too short for that
        pivot = planar_pivot[double](tile, NULL, count, piece, &size) if exact else tile[0]
    for attempt in range(2):
        memset(sums, 0, sizeof(sums))
        accumulate[double, double](tile, count, pivot, sums)
        sum1 = total[double](sums, VECTOR)
        sum2 = total[double](sums + VECTOR, VECTOR)
        if attempt == 1 or not exact or not lossy(sum2):
            break
        size = abs(pivot)
        for j in range(count):
            size = max(size, abs(tile[j]))
        power = power_near(size)
        for j in range(count):
            tile[j] /= power
        pivot /= power
    if exact and not lossy(sum2):
        sum1 = sum_about(tile, count, pivot)
    put_moments(count, sum1, sum2, pivot, power, moments)


cdef void planar_moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *found, real _, stored *none) noexcept nogil:
    cdef double block[4]
    cdef Py_ssize_t pos, stop, row, count
    cdef const stored *x
    cdef real pivot = 0, next_pivot = 0, size = 0
    cdef bint seen = False
    cdef Unit u = unit_of(job, unit)
    cdef Span t
    bounds(job, chunk, &pos, &stop)
    while pos < stop:
        t = planar_span(job, &u, pos, min(stop - pos, BLOCK))
        x = direct[stored](job, &job.x, &t, none, False, &row)
        count = counted_of(job, &t, BLOCK)
        if job.mask.data != NULL and count < SMALL:
            small_block(job, &t, block)
        else:
            if job.mask.data != NULL or x == NULL or not plain_block[stored, real](x, t.lanes, seen, &pivot, &size, block):
                planar_block[real](job, &t, count, seen, &pivot, &size, block)
            # The mean of this block is the pivot of the block after the next: the next one need not wait for it.
            pivot = next_pivot if seen else pivot
            size = max(size, abs(<real> block[PIVOT]))
            next_pivot = on_grid[real](<real> (block[PIVOT] + block[SHIFT]), size) if seen else pivot
            seen = True
        merge(found, block, 1)
        pos += t.lanes


cdef void small_moments(const Job *job, Py_ssize_t unit, double *found) noexcept nogil:
    """The moments of groups of fewer than SMALL values, in either layout."""
    cdef double block[4]
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t g, field
    cdef Span t
    for g in range(u.groups):
        t = planar_span(job, &u, g * job.K * job.S, job.K * job.S)
        small_block(job, &t, block)
        for field in range(4):
            found[field * u.groups + g] = block[field]

# Moments: sums about a pivot near the mean, which chunks merge by Chan's update. What sweeps memory for them is in
# sums.pxi and in the two walks, channels_first.pxi and channels_last.pxi.

cdef enum:
    SMALL = 512  # groups of fewer values have their moments computed in float64: too few roundings average out
    FEW = 256  # and those of fewer their gradient's sums, which have a smaller share in dx
    BLOCK = 4096  # values of channels-first with one pivot: few, for data that drift, and enough to hide how it is found
    SAMPLES = 4  # times LANES values, or rows, tell a pivot: half a standard deviation off is as good as none


cdef inline double sum_of(double a, double b, double *rest) noexcept nogil:
    """a + b and what its rounding leaves out (Knuth, TAOCP 2, 4.2.2)."""
    cdef double sum = a + b, part = sum - a
    rest[0] = (a - (sum - part)) + (b - part)
    return sum


cdef inline void put_mean(double pivot, double shift, double *found, Py_ssize_t groups) noexcept nogil:
    """A mean as its nearest float64 and what that leaves out."""
    found[PIVOT * groups] = sum_of(pivot, shift, found + SHIFT * groups)


cdef inline void merge_group(double *into, const double *other, Py_ssize_t n, Py_ssize_t m) noexcept nogil:
    """Merge the moments of a group, one of n, with others, one of m: Chan, Golub and LeVeque (1983)."""
    cdef double count = into[COUNT * n], other_count = other[COUNT * m], share, delta
    share = other_count / max(count + other_count, 1.0)
    into[PIVOT * n] = other[PIVOT * m] if count == 0 else into[PIVOT * n]
    delta = (other[PIVOT * m] - into[PIVOT * n]) + (other[SHIFT * m] - into[SHIFT * n])
    delta = delta if other_count > 0 else 0
    into[M2 * n] += other[M2 * m] + delta * delta * (count * share)
    into[COUNT * n] = count + other_count
    put_mean(into[PIVOT * n], into[SHIFT * n] + delta * share, into, n)


cdef void merge(const Job *job, double *into, const double *other) noexcept nogil:
    """Merge the moments of a unit's groups with those of another chunk."""
    cdef Py_ssize_t g
    for g in range(job.unit_groups):
        merge_group(into + g, other + g, job.unit_groups, job.unit_groups)


cdef inline bint carried(double sum_of_squares) noexcept nogil:
    """Whether float32 carries squares that add up to this without loss to under- or overflow."""
    return 2.0 ** -80 < sum_of_squares < 2.0 ** 120


cdef inline double above(double size, vec like) noexcept nogil:
    """What is added and taken off again to round a pivot: to the spacing of float32 four times as large as the data,
    and to some 36 bits of float64. Then x - p is exact or its error is random: with lower bits of its own a pivot would
    shift all x of one binade by the same error, which no average removes. In float64 the products of pivots and counts
    are exact too, and so are the squares of x - p of a constant."""
    return 4 * min(size, 1e37) if vec is floats else 2.0 ** 17 * min(size, 1e290)


cdef inline vec on_grid(vec p, vec size) noexcept nogil:
    cdef vec more = times(above(1, p), least(size, all_of(1e37 if vec is floats else 1e290, p)))
    return (p + more) - more


cdef inline vec middle(vec a, vec b, vec c, vec d) noexcept nogil:
    """The mean of the middle two, which no single outlier moves."""
    cdef vec low = most(least(a, b), least(c, d)), high = least(most(a, b), most(c, d))
    return times(0.5, low) + times(0.5, high)


cdef inline vec size_of(vec a, vec b, vec c, vec d) noexcept nogil:
    """The mean of their magnitudes, whose sum could overflow."""
    return (times(0.25, absolute(a)) + times(0.25, absolute(b))) + (times(0.25, absolute(c)) + times(0.25, absolute(d)))


cdef inline double settled(double p, double size, vec like) noexcept nogil:
    """on_grid for a scalar."""
    cdef double more = above(size, like)
    if vec is floats:
        return (<float> p + <float> more) - <float> more
    else:
        return (p + more) - more


cdef inline void put_moments(double count, double sum, double square, double pivot, double near, double *found,
                             Py_ssize_t groups) noexcept nogil:
    """Of one group, from its sums about pivot + near."""
    cdef double shift = sum / max(count, 1.0), rest, centre = sum_of(pivot, near, &rest)
    found[COUNT * groups] = count
    found[M2 * groups] = square - sum * shift
    put_mean(centre, rest + shift, found, groups)


cdef inline double settled_sums(double *sums, double share, vec like) noexcept nogil:
    """A pivot from sums of x and of |x|, of which it is that share."""
    cdef double mean, size
    gn_total(sums, &mean, &size)
    return settled(mean * share, size * share, like)


cdef inline double pivot_of_rows(const stored *x, Py_ssize_t stride, vec like) noexcept nogil:
    """About the mean of data of which SAMPLES times LANES values lie so far apart."""
    cdef double sums[2 * LANES]
    cdef vec a, b, c, d
    cdef Py_ssize_t k
    for k in range(LANES // width(like)):
        a = load(x, like)
        b = load(x + stride, like)
        c = load(x + 2 * stride, like)
        d = load(x + 3 * stride, like)
        put_lanes(sums + k * width(like), middle(a, b, c, d))
        put_lanes(sums + LANES + k * width(like), size_of(a, b, c, d))
        x += width(like)
    return settled_sums(sums, 1.0 / LANES, like)


cdef inline double pivot_of_few(const stored *x, Py_ssize_t n, vec like) noexcept nogil:
    """The mean of some values."""
    cdef double sums[2 * LANES]
    cdef Py_ssize_t i
    memset(sums, 0, sizeof(sums))
    for i in range(n):
        sums[i % LANES] += scalar(x[i]) / n
        sums[LANES + i % LANES] += abs(scalar(x[i])) / n
    return settled_sums(sums, 1, like)


cdef inline double pivot_of(const stored *x, Py_ssize_t n, vec like) noexcept nogil:
    """About the mean of values in a row, from some that are spread over all, so that data that drift stay near. In
    float64, any of few values is near enough."""
    if vec is doubles and stored is not double:
        return scalar(x[0])
    elif n < SAMPLES * LANES:
        return pivot_of_few(x, n, like)
    else:  # not in step with channels, whose edges may be unlike the rest
        return pivot_of_rows(x, n // SAMPLES + (3 * LANES if n >= 2 * SMALL else 0), like)


cdef void give_moments(const Job *job, Py_ssize_t unit, double *known, const Scratch *scratch) noexcept nogil:
    """Round the mean to one float64, so that a later call with these moments gives the same bits."""
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t g, i = u.n * job.G + u.first
    for g in range(u.groups):
        known[PIVOT * u.groups + g] += known[SHIFT * u.groups + g]
        if known[M2 * u.groups + g] != known[M2 * u.groups + g]:
            known[PIVOT * u.groups + g] = known[M2 * u.groups + g]  # an infinity poisons the mean too
        known[SHIFT * u.groups + g] = 0
    if job.mean != NULL:
        for g in range(u.groups):
            job.count[i + g] = <int64_t> known[COUNT * u.groups + g]
            job.mean[i + g] = known[PIVOT * u.groups + g]
            job.m2[i + g] = known[M2 * u.groups + g]


cdef void take_moments(const Job *job, Py_ssize_t unit, double *known, const Scratch *scratch) noexcept nogil:
    cdef Unit u = unit_of(job, unit)
    cdef Py_ssize_t g, i = u.n * job.G + u.first
    for g in range(u.groups):
        known[COUNT * u.groups + g] = job.count[i + g]
        known[PIVOT * u.groups + g] = job.mean[i + g]
        known[M2 * u.groups + g] = job.m2[i + g] if job.count[i + g] > 0 else 0


cdef inline double rest_of(double mean, vec like) noexcept nogil:
    """What rounding a mean to the compute type leaves out: nothing in float64, where infinity would leave NaN."""
    return 0 if vec is doubles else mean - in_type(mean, like)


cdef inline void rstds_of(const Job *job, const double *known, Py_ssize_t groups, double *rstd) noexcept nogil:
    """Of all groups of a unit, DOUBLES at a time."""
    cdef doubles one = gn_all_doubles(1), eps = gn_all_doubles(job.eps), count, m2
    cdef Py_ssize_t g, k
    for k in range(groups // DOUBLES):
        g = k * DOUBLES
        count = most(one, gn_doubles_of_double(known + COUNT * groups + g))
        m2 = gn_doubles_of_double(known + M2 * groups + g)
        gn_doubles_to_double(rstd + g, one / gn_sqrt_doubles(m2 / count + eps), False)
    for g in range(groups - groups % DOUBLES, groups):
        rstd[g] = rstd_of(job, known, groups, g)


cdef inline double rstd_of(const Job *job, const double *known, Py_ssize_t groups, Py_ssize_t g) noexcept nogil:
    return 1 / sqrt(known[M2 * groups + g] / max(known[COUNT * groups + g], 1.0) + job.eps)

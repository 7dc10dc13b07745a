# Moments: sums about a pivot near the mean, which chunks merge by Chan's update. What sweeps memory for them is in sums.pxi
# and in the two walks, channels_first.pxi and channels_last.pxi.

cdef enum:
    SMALL = 512  # groups of fewer values have their moments computed in float64: too few roundings average out
    SAMPLES = 8  # times LANES values are averaged for a pivot: half a standard deviation from the mean is as good as none
    SAMPLED_ROWS = 4  # of channels-last, of which the middle two are averaged


cdef void merge(const Job *job, double *into, const double *other) noexcept nogil:
    """Merge the moments of a unit's groups with others: Chan, Golub and LeVeque (1983)."""
    cdef double count, other_count, share, delta
    cdef Py_ssize_t i, n = job.unit_groups
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


cdef inline void put_moments(double count, double sum, double square, double pivot, double *found, Py_ssize_t groups) noexcept nogil:
    """Of one group, from its sums about a pivot."""
    cdef double shift = sum / max(count, 1.0)
    found[COUNT * groups] = count
    found[PIVOT * groups] = pivot
    found[SHIFT * groups] = shift
    found[M2 * groups] = square - sum * shift


cdef inline bint carried(double sum_of_squares) noexcept nogil:
    """Whether float32 carries squares that add up to this without loss to under- or overflow."""
    return 2.0 ** -80 < sum_of_squares < 2.0 ** 120


cdef inline vec on_grid(vec p, vec size) noexcept nogil:
    """A pivot rounded to the spacing of numbers four times as large as the data: then x - p is exact or its error is random.
    With lower bits of its own it would shift all x of one binade by the same error, which no average removes."""
    cdef vec above = all_of(4, p) * least(size, all_of(1e37, p))
    return (p + above) - above


cdef inline double value_of(vec v) noexcept nogil:
    cdef float f[16]
    cdef double d[8]
    if vec is floats:
        gn_floats_to_float(f, v, False)
        return f[0]
    else:
        gn_doubles_to_double(d, v, False)
        return d[0]


cdef inline double settled(double *sums, double count, vec like) noexcept nogil:
    """A pivot from sums of x / count and of |x| / count."""
    cdef double mean, size
    gn_total(sums, &mean, &size)
    return value_of(on_grid(all_of(mean / count, like), all_of(size / count, like)))


cdef inline double pivot_of_rows(const stored *x, Py_ssize_t stride, vec like) noexcept nogil:
    """About the mean of data of which SAMPLES times LANES values lie so far apart."""
    cdef double sums[2 * LANES]
    cdef vec v, share = all_of(1.0 / SAMPLES, like), mean, size
    cdef Py_ssize_t k, r
    memset(sums, 0, sizeof(sums))
    for k in range(LANES // width(like)):
        mean = size = all_of(0, like)
        for r in range(SAMPLES):
            v = load(x + r * stride + k * width(like), like) * share  # multiplied first: the sum could overflow
            mean = mean + v
            size = size + absolute(v)
        add_lanes(sums + k * width(like), mean)
        add_lanes(sums + LANES + k * width(like), size)
    return settled(sums, LANES, like)


cdef inline double pivot_of_few(const stored *x, Py_ssize_t n, vec like) noexcept nogil:
    """The mean of some values."""
    cdef double sums[2 * LANES]
    cdef Py_ssize_t i
    memset(sums, 0, sizeof(sums))
    for i in range(n):
        sums[i % LANES] += scalar(x[i]) / n
        sums[LANES + i % LANES] += abs(scalar(x[i])) / n
    return settled(sums, 1, like)


cdef inline double pivot_of(const stored *x, Py_ssize_t n, vec like) noexcept nogil:
    """About the mean of values in a row, from some that are spread over all, so that data that drift stay near. In float64, any of
    few values is near enough."""
    if vec is doubles and stored is not double:
        return scalar(x[0])
    elif n < SAMPLES * LANES:
        return pivot_of_few(x, n, like)
    else:
        return pivot_of_rows(x, n // SAMPLES, like)


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


cdef inline double rstd_of(const Job *job, const double *known, Py_ssize_t groups, Py_ssize_t g) noexcept nogil:
    return 1 / sqrt(known[M2 * groups + g] / max(known[COUNT * groups + g], 1.0) + job.eps)

# The kernel: the moments in one pass, then the fused affine, over tiles of either layout.  A module for one
# instruction set is a title page that includes this file; threads and checks live in the door.
#
#   block   a tile of rows x lanes: each lane sums x - p and (x - p)^2 about a pivot p near its mean
#   chunk   the blocks between two places where threads may part; its blocks are merged in order
#   unit    the groups of a sample that are swept together; its chunks are merged in order
#
# All are cut by position alone, so neither threads nor strides nor instruction sets can change a bit.

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport sqrt
from libc.string cimport memset

ctypedef fused real:  # the compute types
    float
    double

include "tile.pxi"
include "activation.pxi"

cdef extern from "port.h" nogil:
    double gn_power_of_two(double)

cdef enum:
    LANES = 64  # of a planar block: 4 to 16 vectors, so that additions overlap
    ROWS = 32  # of a block: few enough for float32 sums to stay within 0.1 ulp, enough to hide the merge
    TILE = ROWS * LANES
    WIDTH = 512  # lanes of an interleaved tile at most: its channels, or several positions of few channels
    AREA = 8192  # values of an interleaved tile at most, 32 KiB of float32
    PIVOT_ROWS = 8  # averaged for a pivot: 0.4 standard deviations from the mean are as good as none
    SHORT = 16  # channels of fewer positions are worked on many at a time


# ---- moments ---------------------------------------------------------------------------------------


cdef void merge(double *into, const double *other, Py_ssize_t n) noexcept nogil:
    """Chan, Golub and LeVeque (1983): the moments of two sets from the moments of each, n times."""
    cdef double *count = into + COUNT * n
    cdef double *pivot = into + PIVOT * n
    cdef double *shift = into + SHIFT * n
    cdef double *m2 = into + M2 * n
    cdef double both, delta, share
    cdef Py_ssize_t i
    for i in range(n):
        pivot[i] = other[PIVOT * n + i] if count[i] == 0 else pivot[i]
        both = count[i] + other[COUNT * n + i]
        share = other[COUNT * n + i] / (both if both > 0 else 1)
        delta = (other[PIVOT * n + i] - pivot[i]) + (other[SHIFT * n + i] - shift[i])
        delta = delta if other[COUNT * n + i] > 0 else 0
        shift[i] += delta * share
        m2[i] += other[M2 * n + i] + delta * delta * (count[i] * share)
        count[i] = both


cdef inline void accumulate(const real *x, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t lanes,
                            const real *p, real *s1, real *s2) noexcept nogil:
    """s1 += sum(x - p), s2 += sum((x - p)^2) down each lane; four rows at a time, for fewer roundings in a chain."""
    cdef Py_ssize_t r, j
    cdef const real *x0
    cdef const real *x1
    cdef const real *x2
    cdef const real *x3
    cdef real d0, d1, d2, d3
    for r in range(0, rows - 3, 4):
        x0 = x + r * row
        x1 = x0 + row
        x2 = x1 + row
        x3 = x2 + row
        for j in range(lanes):
            d0 = x0[j] - p[j]
            d1 = x1[j] - p[j]
            d2 = x2[j] - p[j]
            d3 = x3[j] - p[j]
            s1[j] += (d0 + d1) + (d2 + d3)
            s2[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for r in range(rows & ~3, rows):
        x0 = x + r * row
        for j in range(lanes):
            d0 = x0[j] - p[j]
            s1[j] += d0
            s2[j] += d0 * d0


cdef inline void lane_means(const real *x, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t lanes, real *p) noexcept nogil:
    cdef real share = <real> 1 / <real> rows  # multiplied first: the sum could overflow
    cdef Py_ssize_t r, j
    for j in range(lanes):
        p[j] = 0
    for r in range(rows):
        for j in range(lanes):
            p[j] += x[r * row + j] * share


cdef inline double total(const real *v, Py_ssize_t n) noexcept nogil:
    cdef double part[8]
    cdef Py_ssize_t i, j
    for j in range(8):
        part[j] = 0
    for i in range(0, n - 7, 8):
        for j in range(8):
            part[j] += v[i + j]
    for j in range(n & ~7, n):
        part[j & 7] += v[j]
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]))


cdef inline bint lossy(double sum_of_squares) noexcept nogil:
    """Whether squares may have under- or overflowed in float32 (in float64 the same bounds do no harm)."""
    return not 8e-28 < sum_of_squares < 1e36


cdef inline double power_near(double v) noexcept nogil:
    """The power of two at or below v, where float32 has it and its inverse."""
    return min(max(gn_power_of_two(v), 2.0 ** -126), 2.0 ** 126)


cdef void planar_block(const real *x, const real *mask, Py_ssize_t n, real *copy, double *moments) noexcept nogil:
    """The moments of n <= TILE values of one group; where the mask is 0 they do not count."""
    cdef real p[LANES]
    cdef real s1[LANES]
    cdef real s2[LANES]
    cdef Py_ssize_t lanes = min(n, LANES), rows = n // lanes, tail = n - rows * lanes, j
    cdef double count = n, sum1, sum2
    cdef real pivot, power = 1, big = 0
    if mask == NULL:
        lane_means[real](x, lanes, min(rows, PIVOT_ROWS), lanes, p)
        pivot = <real> (total[real](p, lanes) / lanes)
    else:
        count = total[real](mask, n)
        for j in range(n):
            copy[j] = x[j] if mask[j] != 0 else <real> 0
        pivot = <real> (total[real](copy, n) / max(count, 1.0))
        for j in range(n):
            copy[j] = x[j] if mask[j] != 0 else pivot
        x = copy
    while True:
        for j in range(lanes):
            p[j] = pivot
            s1[j] = 0
            s2[j] = 0
        accumulate[real](x, lanes, rows, lanes, p, s1, s2)
        accumulate[real](x + rows * lanes, 0, 1, tail, p, s1, s2)
        sum1 = total[real](s1, lanes)
        sum2 = total[real](s2, lanes)
        if power != 1 or not lossy(sum2):
            break
        for j in range(n):  # rare: once more, with the values brought near 1
            big = max(big, max(x[j], -x[j]))
        power = <real> power_near(big)
        if power == 1:
            break
        for j in range(n):
            copy[j] = x[j] / power
        x = copy
        pivot = pivot / power
    moments[COUNT] = count
    moments[PIVOT] = <double> pivot * power
    moments[SHIFT] = sum1 / max(count, 1.0) * power
    moments[M2] = (sum2 - sum1 * (sum1 / max(count, 1.0))) * power * power


cdef void planar_moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats, real _) noexcept nogil:
    cdef real xtile[TILE]
    cdef real mtile[TILE]
    cdef real copy[TILE]
    cdef double block[4]
    cdef Py_ssize_t pos, stop = min((chunk + 1) * job.chunk, job.K * job.S), row
    cdef const real *x
    cdef const real *mask = NULL
    cdef Span t
    t.n = unit // job.G
    t.rows = 1
    pos = chunk * job.chunk
    while pos < stop:
        t.c = unit % job.G * job.K + pos // job.S
        t.s = pos % job.S
        t.lanes = min(stop - pos, TILE)
        x = load[real](job, &job.x, &t, xtile, &row)
        if job.mask.data != NULL:
            mask = load[real](job, &job.mask, &t, mtile, &row)
        planar_block[real](x, mask, t.lanes, copy, block)
        merge(stats, block, 1)
        pos += t.lanes


cdef void interleaved_block(const real *x, Py_ssize_t row, const real *mask, Py_ssize_t rows, Py_ssize_t lanes,
                            real *copy, double *moments, Py_ssize_t n) noexcept nogil:
    """The moments of the first `lanes` of n sets, one a lane; where the mask is 0 values do not count."""
    cdef real p[WIDTH]
    cdef real s1[WIDTH]
    cdef real s2[WIDTH]
    cdef real count[WIDTH]
    cdef real power[WIDTH]
    cdef double mean
    cdef Py_ssize_t r, j
    cdef bint again = False
    for j in range(lanes):
        count[j] = <real> rows
        power[j] = 1
        s1[j] = 0
        s2[j] = 0
    if mask == NULL:
        lane_means[real](x, row, min(rows, PIVOT_ROWS), lanes, p)
    else:
        for j in range(lanes):
            count[j] = 0
            p[j] = 0
        for r in range(rows):
            for j in range(lanes):
                count[j] += mask[r * lanes + j]
        for r in range(rows):
            for j in range(lanes):
                p[j] += x[r * row + j] / count[j] if mask[r * lanes + j] != 0 else <real> 0
        for r in range(rows):
            for j in range(lanes):
                copy[r * lanes + j] = x[r * row + j] if mask[r * lanes + j] != 0 else p[j]
        x = copy
        row = lanes
    accumulate[real](x, row, rows, lanes, p, s1, s2)
    for j in range(lanes):
        again |= lossy(s2[j])
    if again:  # rare: once more, with the values of such lanes brought near 1
        for j in range(lanes):
            if lossy(s2[j]):
                power[j] = 0
                for r in range(rows):
                    power[j] = max(power[j], max(x[r * row + j], -x[r * row + j]))
                power[j] = <real> power_near(power[j])
            p[j] = p[j] / power[j]
            s1[j] = 0
            s2[j] = 0
        for r in range(rows):
            for j in range(lanes):
                copy[r * lanes + j] = x[r * row + j] / power[j]
        accumulate[real](copy, lanes, rows, lanes, p, s1, s2)
    for j in range(lanes):
        mean = s1[j] / <double> (count[j] if count[j] > 0 else <real> 1)
        moments[COUNT * n + j] = count[j]
        moments[PIVOT * n + j] = <double> p[j] * power[j]
        moments[SHIFT * n + j] = mean * power[j]
        moments[M2 * n + j] = (s2[j] - s1[j] * mean) * power[j] * power[j]


cdef inline Py_ssize_t strip(const Job *job, Py_ssize_t c, Py_ssize_t stop) noexcept nogil:
    """How many channels from c on share an interleaved tile: whole groups, or a part of one wide group."""
    if job.K > WIDTH:
        return min(WIDTH, job.K - c % job.K)
    return min(WIDTH // job.K * job.K, stop - c)


cdef inline Py_ssize_t next_rows(Py_ssize_t left, Py_ssize_t width, Py_ssize_t *fold) noexcept nogil:
    """How many of the positions left make the next tile, `fold` of them to a row of lanes (so that few channels
    fill the lanes too): whole rows, or what is left of one."""
    fold[0] = min(max(1, WIDTH // 4 // width), left)
    return min(min(ROWS, AREA // (fold[0] * width) & ~3), left // fold[0]) * fold[0]


cdef void gather_lanes(const double *lane, Py_ssize_t n, Py_ssize_t width, Py_ssize_t channels, double *one) noexcept nogil:
    """The moments of a group from those of its lanes: some channels of each position of a row."""
    cdef double pivot = lane[PIVOT * n], count = 0, sum1 = 0, sum2 = 0, shift, mean
    cdef Py_ssize_t r, j
    for r in range(0, n // width):
        for j in range(r * width, r * width + channels):
            count += lane[COUNT * n + j]
            if lane[COUNT * n + j] > 0:
                sum1 += lane[COUNT * n + j] * ((lane[PIVOT * n + j] - pivot) + lane[SHIFT * n + j])
    mean = sum1 / max(count, 1.0)
    for r in range(0, n // width):
        for j in range(r * width, r * width + channels):
            if lane[COUNT * n + j] > 0:
                shift = ((lane[PIVOT * n + j] - pivot) + lane[SHIFT * n + j]) - mean
                sum2 += lane[M2 * n + j] + lane[COUNT * n + j] * (shift * shift)
    one[COUNT] = count
    one[PIVOT] = pivot
    one[SHIFT] = mean
    one[M2] = sum2


cdef void interleaved_moments(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats, real _) noexcept nogil:
    cdef real xtile[AREA]
    cdef real mtile[AREA]
    cdef real copy[AREA]
    cdef double lane[4 * WIDTH]
    cdef double block[4 * WIDTH]
    cdef double one[4]
    cdef double group[4]
    cdef Py_ssize_t strips = job.units // job.N, first = unit % strips * job.unit_groups
    cdef Py_ssize_t groups = min(job.unit_groups, job.G - first), c = first * job.K, end = c + groups * job.K
    cdef Py_ssize_t stop = min((chunk + 1) * job.chunk, job.S), width, fold, n, row, j, i, run, g, field
    cdef const real *x
    cdef const real *mask = NULL
    cdef Span t
    t.n = unit // strips
    while c < end:
        width = strip(job, c, end)
        n = max(1, WIDTH // 4 // width) * width
        memset(lane, 0, 4 * n * sizeof(double))
        t.c = c
        t.s = chunk * job.chunk
        t.lanes = width
        while t.s < stop:
            t.rows = next_rows(stop - t.s, width, &fold)
            x = load[real](job, &job.x, &t, xtile, &row)
            if fold > 1 and row != width:
                move[real](job, &job.x, &t, xtile, False)
                x = xtile
                row = width
            if job.mask.data != NULL:
                mask = load[real](job, &job.mask, &t, mtile, &j)
            if fold * width < n:
                memset(block, 0, 4 * n * sizeof(double))
            interleaved_block[real](x, row * fold, mask, t.rows // fold, fold * width, copy, block, n)
            merge(lane, block, n)
            t.s += t.rows
        i = 0
        while i < width:
            run = min(width - i, job.K - (c + i) % job.K)
            g = (c + i) // job.K - first
            gather_lanes(lane + i, n, width, run, one)
            for field in range(4):
                group[field] = stats[field * groups + g]
            merge(group, one, 1)
            for field in range(4):
                stats[field * groups + g] = group[field]
            i += run
        c += width


# ---- the affine ------------------------------------------------------------------------------------


cdef struct Standard:  # a group's part of the affine: x * power - mean - rest is (x - mean) * rstd / factor
    double power, mean, rest, factor


cdef inline void standardize(const double *stats, Py_ssize_t groups, Py_ssize_t g, double eps, Standard *z, real _) noexcept nogil:
    """Split the mean into a value of the compute type and the rest, up to 3% of a standard deviation where mean/std is
    1e6. The power of two near rstd costs no bit and keeps all factors in range for any finite x."""
    cdef double mean = stats[PIVOT * groups + g] + stats[SHIFT * groups + g]
    cdef double rstd = 1 / sqrt(stats[M2 * groups + g] / max(stats[COUNT * groups + g], 1.0) + eps)
    z.power = power_near(rstd)
    if not -1e30 < mean * z.power < 1e30:
        z.power = 1
    z.mean = <real> (mean * z.power)
    z.rest = mean * z.power - z.mean
    z.factor = rstd / z.power


cdef inline const double *values_of_channels(const View *v, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels,
                                             double absent, double *buffer) noexcept nogil:
    """A weight's or bias's values, where they lie if they are contiguous float64."""
    cdef Py_ssize_t i
    if v.data == NULL:
        for i in range(channels):
            buffer[i] = absent
    elif v.storage == FLOAT64 and v.channel_stride == sizeof(double):
        return <const double *> address(v, n, c, 0)
    else:
        read_run[double](v, address(v, n, c, 0), v.channel_stride, buffer, channels)
    return buffer


cdef void weigh(const Job *job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t channels, const Standard *z,
                real *scale, real *shift) noexcept nogil:
    """For channels of one group: (x * power - mean) * scale + shift is the normalized, weighted and biased x."""
    cdef double buffer[2][WIDTH]
    cdef const double *weight = values_of_channels(&job.weight, n, c, channels, 1, buffer[0])
    cdef const double *bias = values_of_channels(&job.bias, n, c, channels, 0, buffer[1])
    cdef double factor = z.factor, rest = z.rest
    cdef Py_ssize_t i
    for i in range(channels):
        scale[i] = <real> (weight[i] * factor)
    for i in range(channels):
        shift[i] = <real> (bias[i] - rest * (weight[i] * factor))


cdef void finish(const Job *job, const Span *t, real *y, Py_ssize_t row, const real *buffer) noexcept nogil:
    """What follows the affine: the residual, the activation and, from a buffer, the store."""
    cdef real rtile[AREA]
    cdef const real *residual
    cdef Py_ssize_t r, j, rrow
    if job.residual.data != NULL:
        residual = load[real](job, &job.residual, t, rtile, &rrow)
        for r in range(t.rows):
            for j in range(t.lanes):
                y[r * row + j] += residual[r * rrow + j]
    if job.activation != IDENTITY:
        if row == t.lanes:
            activate[real](job.activation, y, t.rows * t.lanes)
        else:
            for r in range(t.rows):
                activate[real](job.activation, y + r * row, t.lanes)
    if y == buffer:
        move[real](job, &job.y, t, y, True)


cdef void repeat(const real *v, Py_ssize_t first, Py_ssize_t times, Py_ssize_t n, real *each) noexcept nogil:
    """Each value of v `times` times, the first of them `first` times, n in all."""
    cdef Py_ssize_t i = 0, j, k = 0, run = first
    while i < n:
        for j in range(i, min(i + run, n)):
            each[j] = v[k]
        i += run
        k += 1
        run = times


cdef void planar_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats, real _) noexcept nogil:
    cdef real xtile[TILE]
    cdef real ytile[TILE]
    cdef real scale[WIDTH]
    cdef real shift[WIDTH]
    cdef real each_scale[WIDTH]
    cdef real each_shift[WIDTH]
    cdef Py_ssize_t size = TILE if job.S >= SHORT else WIDTH, stop = min((chunk + 1) * job.chunk, job.K * job.S)
    cdef Py_ssize_t pos = chunk * job.chunk, c = unit % job.G * job.K, first = 0, known = 0, k, last, row, i, j, run
    cdef real power, mean, a, b
    cdef const real *x
    cdef const real *scales
    cdef const real *shifts
    cdef real *y
    cdef Standard z
    cdef Span t
    t.n = unit // job.G
    t.rows = 1
    standardize[real](stats, 1, 0, job.eps, &z, 0)
    power = <real> z.power
    mean = <real> z.mean
    while pos < stop:
        t.lanes = min(stop - pos, size)
        t.s = pos % job.S
        t.c = c + pos // job.S
        k = pos // job.S
        last = (pos + t.lanes - 1) // job.S
        if last >= first + known:
            first = k
            known = min(WIDTH, (stop - 1) // job.S + 1 - first)
            weigh[real](job, t.n, t.c, known, &z, scale, shift)
        x = load[real](job, &job.x, &t, xtile, &row)
        y = direct[real](job, &job.y, &t, ytile, &row)
        if job.S >= SHORT:
            i = 0
            while i < t.lanes:
                run = min(t.lanes - i, job.S - (t.s if i == 0 else 0))
                a = scale[k - first]
                b = shift[k - first]
                for j in range(i, i + run):
                    y[j] = (x[j] * power - mean) * a + b
                i += run
                k += 1
        else:
            scales = scale + (k - first)
            shifts = shift + (k - first)
            if job.S > 1:
                repeat[real](scales, job.S - t.s, job.S, t.lanes, each_scale)
                repeat[real](shifts, job.S - t.s, job.S, t.lanes, each_shift)
                scales = each_scale
                shifts = each_shift
            for j in range(t.lanes):
                y[j] = (x[j] * power - mean) * scales[j] + shifts[j]
        finish[real](job, &t, y, t.lanes, ytile)
        pos += t.lanes


cdef void interleaved_affine(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats, real _) noexcept nogil:
    cdef real xtile[AREA]
    cdef real ytile[AREA]
    cdef real power[WIDTH]
    cdef real mean[WIDTH]
    cdef real scale[WIDTH]
    cdef real shift[WIDTH]
    cdef Py_ssize_t strips = job.units // job.N, first = unit % strips * job.unit_groups
    cdef Py_ssize_t groups = min(job.unit_groups, job.G - first), c = first * job.K, end = c + groups * job.K
    cdef Py_ssize_t stop = min((chunk + 1) * job.chunk, job.S), width, fold, r, j, i, run, row, yrow
    cdef const real *x
    cdef real *y
    cdef Standard z
    cdef Span t
    t.n = unit // strips
    while c < end:
        width = strip(job, c, end)
        i = 0
        while i < width:
            run = min(width - i, job.K - (c + i) % job.K)
            standardize[real](stats, groups, (c + i) // job.K - first, job.eps, &z, 0)
            weigh[real](job, t.n, c + i, run, &z, scale + i, shift + i)
            for j in range(i, i + run):
                power[j] = <real> z.power
                mean[j] = <real> z.mean
            i += run
        for j in range(width, max(1, WIDTH // 4 // width) * width):
            power[j] = power[j - width]
            mean[j] = mean[j - width]
            scale[j] = scale[j - width]
            shift[j] = shift[j - width]
        t.c = c
        t.s = chunk * job.chunk
        t.lanes = width
        while t.s < stop:
            t.rows = next_rows(stop - t.s, width, &fold)
            x = load[real](job, &job.x, &t, xtile, &row)
            y = direct[real](job, &job.y, &t, ytile, &yrow)
            if row != width or yrow != width:
                fold = 1
            for r in range(0, t.rows // fold):
                i = r * fold * row
                run = r * fold * yrow
                for j in range(fold * width):
                    y[run + j] = (x[i + j] * power[j] - mean[j]) * scale[j] + shift[j]
            finish[real](job, &t, y, yrow, ytile)
            t.s += t.rows
        c += width


# ---- the table -------------------------------------------------------------------------------------


cdef void moments32(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats) noexcept nogil:
    if job.interleaved:
        interleaved_moments[float](job, unit, chunk, stats, 0)
    else:
        planar_moments[float](job, unit, chunk, stats, 0)


cdef void moments64(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats) noexcept nogil:
    if job.interleaved:
        interleaved_moments[double](job, unit, chunk, stats, 0)
    else:
        planar_moments[double](job, unit, chunk, stats, 0)


cdef void affine32(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats) noexcept nogil:
    if job.interleaved:
        interleaved_affine[float](job, unit, chunk, stats, 0)
    else:
        planar_affine[float](job, unit, chunk, stats, 0)


cdef void affine64(const Job *job, Py_ssize_t unit, Py_ssize_t chunk, double *stats) noexcept nogil:
    if job.interleaved:
        interleaved_affine[double](job, unit, chunk, stats, 0)
    else:
        planar_affine[double](job, unit, chunk, stats, 0)


cdef Kernel kernel
kernel.moments[0] = moments32
kernel.moments[1] = moments64
kernel.affine[0] = affine32
kernel.affine[1] = affine64
kernel.merge = merge
KERNEL = PyCapsule_New(&kernel, "gn_fast.kernel", NULL)

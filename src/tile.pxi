# Tiles: some thousand values of an array in the compute type, in L1.  Storage types, strides and streaming
# stores live in this file and nowhere else.

from libc.stdint cimport uint8_t, uint16_t
from libc.string cimport memcpy, memset

cdef extern from "port.h" nogil:
    float gn_from_half(uint16_t)
    uint16_t gn_to_half(float)
    float gn_from_bfloat(uint16_t)
    uint16_t gn_to_bfloat(float)
    void gn_widen_half(const uint16_t *, float *, Py_ssize_t)
    void gn_narrow_half(const float *, uint16_t *, Py_ssize_t)
    void gn_stream(void *, const void *, size_t)

cdef enum:
    PACKET = 256  # values gathered at a time from strided memory

cdef struct Span:  # the part of an array that a tile holds, from sample n, channel c, position s on
    Py_ssize_t n, c, s
    Py_ssize_t rows, lanes  # positions x channels; planar: 1 x so many values, channel by channel
    bint planar


cdef void widen(Storage storage, const void *memory, real *tile, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if storage == FLOAT32:
        for j in range(n):
            tile[j] = (<const float *> memory)[j]
    elif storage == FLOAT64:
        for j in range(n):
            tile[j] = <real> (<const double *> memory)[j]
    elif storage == BFLOAT16:
        for j in range(n):
            tile[j] = gn_from_bfloat((<const uint16_t *> memory)[j])
    elif real is float:
        gn_widen_half(<const uint16_t *> memory, tile, n)
    else:
        for j in range(n):
            tile[j] = gn_from_half((<const uint16_t *> memory)[j])


cdef void narrow(Storage storage, const real *tile, void *memory, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if storage == FLOAT32:
        for j in range(n):
            (<float *> memory)[j] = <float> tile[j]
    elif storage == FLOAT64:
        for j in range(n):
            (<double *> memory)[j] = tile[j]
    elif storage == BFLOAT16:
        for j in range(n):
            (<uint16_t *> memory)[j] = gn_to_bfloat(<float> tile[j])
    elif real is float:
        gn_narrow_half(tile, <uint16_t *> memory, n)
    else:
        for j in range(n):
            (<uint16_t *> memory)[j] = gn_to_half(<float> tile[j])


# Values move in the type they have: another of the same size would break C's aliasing rule.

cdef void gather(const char *p, Py_ssize_t stride, Py_ssize_t size, void *packet, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if size == 4:
        for j in range(n):
            (<float *> packet)[j] = (<const float *> (p + j * stride))[0]
    elif size == 8:
        for j in range(n):
            (<double *> packet)[j] = (<const double *> (p + j * stride))[0]
    elif size == 2:
        for j in range(n):
            (<uint16_t *> packet)[j] = (<const uint16_t *> (p + j * stride))[0]
    else:
        for j in range(n):
            (<uint8_t *> packet)[j] = (<const uint8_t *> (p + j * stride))[0]


cdef void scatter(const void *packet, Py_ssize_t size, char *p, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if size == 4:
        for j in range(n):
            (<float *> (p + j * stride))[0] = (<const float *> packet)[j]
    elif size == 8:
        for j in range(n):
            (<double *> (p + j * stride))[0] = (<const double *> packet)[j]
    else:
        for j in range(n):
            (<uint16_t *> (p + j * stride))[0] = (<const uint16_t *> packet)[j]


cdef void read_run(const View *v, const char *p, Py_ssize_t stride, real *tile, Py_ssize_t n) noexcept nogil:
    cdef double packet[PACKET]
    cdef Py_ssize_t i = 0, m
    if stride == v.itemsize:
        widen[real](v.storage, p, tile, n)
        return
    while i < n:
        m = min(n - i, PACKET)
        gather(p + i * stride, stride, v.itemsize, packet, m)
        widen[real](v.storage, packet, tile + i, m)
        i += m


cdef void write_run(const View *v, char *p, Py_ssize_t stride, const real *tile, Py_ssize_t n) noexcept nogil:
    cdef double packet[PACKET]
    cdef Py_ssize_t i = 0, m
    if stride == v.itemsize and not v.streamed:
        narrow[real](v.storage, tile, p, n)
    elif stride == v.itemsize and v.itemsize == sizeof(real):
        gn_stream(p, tile, n * sizeof(real))
    else:
        while i < n:
            m = min(n - i, PACKET)
            narrow[real](v.storage, tile + i, packet, m)
            if stride == v.itemsize:
                gn_stream(p + i * stride, packet, m * v.itemsize)
            else:
                scatter(packet, v.itemsize, p + i * stride, stride, m)
            i += m


cdef inline char *address(const View *v, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    cdef char *p = v.data + n * v.sample_stride + c * v.channel_stride
    cdef int d
    for d in range(v.ndim - 1, 0, -1):
        p += (s % v.shape[d]) * v.stride[d]
        s = s // v.shape[d]
    return p + s * v.stride[0]


cdef void move(const Job *job, const View *v, const Span *t, real *tile, bint store) noexcept nogil:
    """Walk the runs of equal stride that make up a span, reading them into the tile or writing them from it."""
    cdef Py_ssize_t inner = v.shape[v.ndim - 1], stride = v.stride[v.ndim - 1], total = t.rows * t.lanes
    cdef Py_ssize_t c = t.c, s = t.s, done = 0, run
    cdef bint flat
    if t.planar:
        flat = v.ndim == 1 and v.channel_stride == job.S * stride
    else:
        stride = v.channel_stride
        flat = v.ndim == 1 and v.stride[0] == t.lanes * stride
    while done < total:
        if flat:
            run = total
        elif t.planar:
            run = min(total - done, inner - s % inner)
        else:
            run = t.lanes
        if store:
            write_run[real](v, address(v, t.n, c, s), stride, tile + done, run)
        else:
            read_run[real](v, address(v, t.n, c, s), stride, tile + done, run)
        done += run
        s += run if t.planar else 1
        if s == job.S and t.planar:
            s = 0
            c += 1


cdef inline Span planar_span(const Job *job, const Unit *u, Py_ssize_t pos, Py_ssize_t n) noexcept nogil:
    """So many values of a unit, from the one at pos on."""
    cdef Span t
    t.n = u.n
    t.c = u.c + pos // job.S
    t.s = pos % job.S
    t.rows = 1
    t.lanes = n
    t.planar = True
    return t


cdef inline void advance(const Job *job, const Span *whole, Span *t) noexcept nogil:
    """From a planar span, a part of a whole, to what is left of that behind it."""
    cdef Py_ssize_t stop = (whole.c - t.c) * job.S + whole.s + whole.lanes  # counted from channel t.c on
    t.s += t.lanes
    t.lanes = stop - t.s
    if t.s >= job.S:
        t.c += t.s // job.S
        t.s %= job.S


cdef inline bint in_one_run(const Job *job, const View *v, const Span *t) noexcept nogil:
    """Whether a planar span's values follow one another in memory."""
    cdef Py_ssize_t inner = v.shape[v.ndim - 1]
    if v.stride[v.ndim - 1] != v.itemsize:
        return False
    return (t.s if v.ndim == 1 else t.s % inner) + t.lanes <= inner or (v.ndim == 1 and v.channel_stride == job.S * v.itemsize)


cdef inline Py_ssize_t counted(const uint8_t *mask, Py_ssize_t n) noexcept nogil:
    """How many of up to 32 * 255 positions count."""
    cdef uint8_t lane[32]
    cdef Py_ssize_t count = 0, j, r
    memset(lane, 0, sizeof(lane))
    for r in range(n // 32):
        for j in range(32):
            lane[j] += mask[r * 32 + j] != 0
    for j in range(n & ~31, n):
        count += mask[j] != 0
    for j in range(32):
        count += lane[j]
    return count


cdef inline const uint8_t *load_mask(const Job *job, Span t, Py_ssize_t positions, uint8_t *buffer) noexcept nogil:
    """The mask of a planar span, or of so many positions of another; NULL if there is no mask."""
    cdef const View *v = &job.mask
    cdef Py_ssize_t done = 0, inner, run
    if v.data == NULL:
        return NULL
    inner = v.shape[v.ndim - 1]
    t.lanes = positions
    if in_one_run(job, v, &t):
        return <const uint8_t *> address(v, t.n, t.c, t.s)
    while done < positions:
        run = min(positions - done, inner - t.s % inner)
        if v.stride[v.ndim - 1] == 1:
            memcpy(buffer + done, address(v, t.n, t.c, t.s), run)
        else:
            gather(address(v, t.n, t.c, t.s), v.stride[v.ndim - 1], 1, buffer + done, run)
        done += run
        t.s += run
        if t.s == job.S:
            t.s = 0
            t.c += 1
    return buffer


cdef inline real *direct(const Job *job, const View *v, const Span *t, real *buffer, Py_ssize_t *row) noexcept nogil:
    """Where to work on a span, and the distance of its rows: where it lies if it needs no conversion, else the buffer."""
    row[0] = t.lanes
    if v.storage < FLOAT32 or v.itemsize != sizeof(real) or v.buffered:
        return buffer
    if t.planar:
        if not in_one_run(job, v, t):
            return buffer
    else:
        if v.channel_stride != v.itemsize or v.ndim > 1 or v.stride[0] % v.itemsize:
            return buffer
        row[0] = v.stride[0] // v.itemsize
    return <real *> address(v, t.n, t.c, t.s)


cdef inline real *load(const Job *job, const View *v, const Span *t, real *buffer, Py_ssize_t *row) noexcept nogil:
    cdef real *tile = direct[real](job, v, t, buffer, row)
    if tile == buffer:
        move[real](job, v, t, tile, False)
    return tile


cdef inline Py_ssize_t pack(const real *x, Py_ssize_t row, const Span *t, const uint8_t *mask, real *tile) noexcept nogil:
    """Bring a span's rows, or those that count, together in a tile, and return how many they are."""
    cdef Py_ssize_t r, j, count = 0
    if x == tile and mask == NULL:
        return t.rows
    for r in range(t.rows):
        if mask == NULL or mask[r] != 0:
            for j in range(t.lanes):
                tile[count * t.lanes + j] = x[r * row + j]
            count += 1
    return count

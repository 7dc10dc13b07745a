# Tiles: some thousand values of an array, where they lie or gathered in L1; and their types. Strides live in this file
# and nowhere else.

from libc.stdint cimport uint8_t, uint16_t
from libc.string cimport memcpy, memset

cdef extern from "port.h" nogil:
    ctypedef struct half "gn_half":
        pass
    ctypedef struct bfloat "gn_bfloat":
        pass
    float gn_from_half(half)
    float gn_from_bfloat(bfloat)
    void gn_widen_half(const half *, float *, int)
    void gn_narrow_half(const float *, half *, int)
    void gn_widen_bfloat(const bfloat *, float *, int)
    void gn_narrow_bfloat(const float *, bfloat *, int)
    void gn_stream(void *, const void *, size_t)
    void gn_stream_lines(void *, const void *, size_t)
    Py_ssize_t gn_before_line(const void *)

ctypedef fused stored:  # the types of values in memory
    float
    double
    half
    bfloat

cdef enum:
    PACKET = 256  # values gathered at a time from strided memory

cdef struct Span:  # the part of an array that a tile holds, from sample n, channel c, position s on
    Py_ssize_t n, c, s
    Py_ssize_t rows, lanes  # positions x channels; planar: 1 x so many values, channel by channel
    bint planar


cdef inline void widen(const stored *memory, real *tile, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if stored is half:
        if real is float:
            gn_widen_half(memory, tile, n)
        else:
            for j in range(n):
                tile[j] = gn_from_half(memory[j])
    elif stored is bfloat:
        if real is float:
            gn_widen_bfloat(memory, tile, n)
        else:
            for j in range(n):
                tile[j] = gn_from_bfloat(memory[j])
    else:
        for j in range(n):
            tile[j] = <real> memory[j]


cdef inline void narrow(const real *tile, stored *memory, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if stored is half:
        if real is float:  # no double is narrowed to 16 bits
            gn_narrow_half(tile, memory, n)
    elif stored is bfloat:
        if real is float:
            gn_narrow_bfloat(tile, memory, n)
    else:
        for j in range(n):
            memory[j] = <stored> tile[j]


cdef void widen_as(Storage storage, const void *memory, real *tile, Py_ssize_t n) noexcept nogil:
    if storage == FLOAT16:
        widen[half, real](<const half *> memory, tile, n)
    elif storage == BFLOAT16:
        widen[bfloat, real](<const bfloat *> memory, tile, n)
    elif storage == FLOAT32:
        widen[float, real](<const float *> memory, tile, n)
    else:
        widen[double, real](<const double *> memory, tile, n)


cdef void narrow_as(Storage storage, const real *tile, void *memory, Py_ssize_t n) noexcept nogil:
    if storage == FLOAT16:
        narrow[real, half](tile, <half *> memory, n)
    elif storage == BFLOAT16:
        narrow[real, bfloat](tile, <bfloat *> memory, n)
    elif storage == FLOAT32:
        narrow[real, float](tile, <float *> memory, n)
    else:
        narrow[real, double](tile, <double *> memory, n)


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


cdef inline char *address(const View *v, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    cdef char *p = v.data + n * v.sample_stride + c * v.channel_stride
    cdef int d
    for d in range(v.ndim - 1, 0, -1):
        p += (s % v.shape[d]) * v.stride[d]
        s = s // v.shape[d]
    return p + s * v.stride[0]


cdef inline Storage storage_as(const stored *_) noexcept nogil:
    if stored is half:
        return FLOAT16
    elif stored is bfloat:
        return BFLOAT16
    elif stored is float:
        return FLOAT32
    else:
        return FLOAT64


cdef void read_run(const View *v, const char *p, Py_ssize_t stride, stored *tile, Py_ssize_t n) noexcept nogil:
    """Read values a stride apart, into a tile of their type or of a compute type (a 16-bit tile holds its own type only)."""
    cdef double packet[PACKET]
    cdef Py_ssize_t i = 0, m
    if v.storage == storage_as(tile):
        if stride == v.itemsize:
            memcpy(tile, p, n * sizeof(stored))
        else:
            gather(p, stride, sizeof(stored), tile, n)
    elif stored is float or stored is double:
        if stride == v.itemsize:
            widen_as[stored](v.storage, p, tile, n)
            return
        while i < n:
            m = min(n - i, PACKET)
            gather(p + i * stride, stride, v.itemsize, packet, m)
            widen_as[stored](v.storage, packet, tile + i, m)
            i += m


cdef void write_run(const View *v, char *p, Py_ssize_t stride, const stored *tile, Py_ssize_t n) noexcept nogil:
    cdef double packet[PACKET]
    cdef Py_ssize_t i = 0, m
    if v.storage == storage_as(tile):
        if stride != v.itemsize:
            scatter(tile, sizeof(stored), p, stride, n)
        elif v.streamed:
            gn_stream(p, tile, n * sizeof(stored))
        else:
            memcpy(p, tile, n * sizeof(stored))
    elif stored is float or stored is double:
        if stride == v.itemsize and not v.streamed:
            narrow_as[stored](v.storage, tile, p, n)
            return
        while i < n:
            m = min(n - i, PACKET)
            narrow_as[stored](v.storage, tile + i, packet, m)
            if stride == v.itemsize:
                gn_stream(p + i * stride, packet, m * v.itemsize)
            else:
                scatter(packet, v.itemsize, p + i * stride, stride, m)
            i += m


cdef void move(const Job *job, const View *v, const Span *t, stored *tile, bint store) noexcept nogil:
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
            write_run[stored](v, address(v, t.n, c, s), stride, tile + done, run)
        else:
            read_run[stored](v, address(v, t.n, c, s), stride, tile + done, run)
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
    cdef Py_ssize_t j, r
    cdef int count = 0
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


cdef Py_ssize_t counted_of(const Job *job, const Span *whole, Py_ssize_t enough) noexcept nogil:
    """How many values of a planar span count, or at least `enough`."""
    cdef uint8_t buffer[32 * 64]
    cdef Py_ssize_t count = 0
    cdef Span t = whole[0]
    if job.mask.data == NULL:
        return t.lanes
    while t.lanes > 0 and count < enough:
        t.lanes = min(t.lanes, <Py_ssize_t> sizeof(buffer))
        count += counted(load_mask(job, t, t.lanes, buffer), t.lanes)
        advance(job, whole, &t)
    return count


cdef inline stored *direct(const Job *job, const View *v, const Span *t, stored *buffer, bint stream,
                           Py_ssize_t *row) noexcept nogil:
    """Where to work on a span, and the distance of its rows: where it lies if it needs no conversion and is not to be
    written past the caches, unless that is done by who asks; else the buffer."""
    row[0] = t.lanes
    if v.storage != storage_as(buffer) or (v.streamed and not stream):
        return buffer
    if t.planar:
        if not in_one_run(job, v, t):
            return buffer
    else:
        if v.channel_stride != v.itemsize or v.ndim > 1 or v.stride[0] % v.itemsize:
            return buffer
        row[0] = v.stride[0] // v.itemsize
    return <stored *> address(v, t.n, t.c, t.s)


cdef inline stored *load(const Job *job, const View *v, const Span *t, stored *buffer, Py_ssize_t *row) noexcept nogil:
    cdef stored *tile = direct[stored](job, v, t, buffer, False, row)
    if tile == buffer:
        move[stored](job, v, t, tile, False)
    return tile


cdef inline Py_ssize_t pack(const stored *x, Py_ssize_t row, const Span *t, const uint8_t *mask, stored *tile) noexcept nogil:
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


cdef inline const stored *in_a_row(const stored *x, Py_ssize_t *row, const Span *t, stored *tile) noexcept nogil:
    """Rows of few lanes brought together, so that several make a run of the length that the affine works on."""
    if row[0] == t.lanes or t.lanes >= SHORT:
        return x
    pack[stored](x, row[0], t, NULL, tile)
    row[0] = t.lanes
    return tile

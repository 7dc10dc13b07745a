# Tiles: some values of an array, where they lie or gathered in level 1; and their types. Strides, masks and mixed types live
# in this file and nowhere else.

cdef enum:
    TILE = 1536  # values of a tile at most: whole pieces, and up to twice STEP rows of STRIP lanes; one of x holds BLOCK
    PACKET = 128  # values gathered at a time from strided memory

cdef struct Span:  # the part of an array that a tile holds, from sample n, channel c, position s on
    Py_ssize_t n, c, s
    Py_ssize_t rows, lanes  # positions x channels; in channels-first 1 x so many values, channel by channel


cdef inline Storage storage_as(const stored *_) noexcept nogil:
    if stored is half:
        return FLOAT16
    elif stored is bfloat:
        return BFLOAT16
    elif stored is float:
        return FLOAT32
    else:
        return FLOAT64


cdef inline double scalar(stored v) noexcept nogil:
    if stored is half:
        return gn_from_half(v)
    elif stored is bfloat:
        return gn_from_bfloat(v)
    else:
        return v


cdef void widen(Storage storage, const void *memory, real *tile, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if storage == FLOAT16:
        for j in range(n):
            tile[j] = <real> gn_from_half((<const half *> memory)[j])
    elif storage == BFLOAT16:
        for j in range(n):
            tile[j] = <real> gn_from_bfloat((<const bfloat *> memory)[j])
    elif storage == FLOAT32:
        for j in range(n):
            tile[j] = <real> (<const float *> memory)[j]
    else:
        for j in range(n):
            tile[j] = <real> (<const double *> memory)[j]


cdef void narrow(Storage storage, const real *tile, void *memory, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    if storage == FLOAT16:
        for j in range(n):
            (<half *> memory)[j] = gn_to_half(<float> tile[j])
    elif storage == BFLOAT16:
        for j in range(n):
            (<bfloat *> memory)[j] = gn_to_bfloat(<float> tile[j])
    elif storage == FLOAT32:
        for j in range(n):
            (<float *> memory)[j] = <float> tile[j]
    else:
        for j in range(n):
            (<double *> memory)[j] = <double> tile[j]


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


cdef void read_run(const View *v, const char *p, Py_ssize_t stride, stored *tile, Py_ssize_t n) noexcept nogil:
    """Read values a stride apart, into a tile of their type or of a compute type."""
    cdef double packet[PACKET]
    cdef Py_ssize_t i, m
    if v.storage == storage_as(tile):
        if stride == v.itemsize:
            memcpy(tile, p, n * sizeof(stored))
        else:
            gather(p, stride, sizeof(stored), tile, n)
    elif stored is float or stored is double:
        if stride == v.itemsize:
            widen[stored](v.storage, p, tile, n)
            return
        for i from 0 <= i < n by PACKET:
            m = min(n - i, PACKET)
            gather(p + i * stride, stride, v.itemsize, packet, m)
            widen[stored](v.storage, packet, tile + i, m)


cdef void put_run(const View *v, char *p, Py_ssize_t stride, const void *values, Py_ssize_t n) noexcept nogil:
    if stride != v.itemsize:
        scatter(values, v.itemsize, p, stride, n)
    elif v.streamed:
        gn_stream(p, values, n * v.itemsize)
    else:
        memcpy(p, values, n * v.itemsize)


cdef void write_run(const View *v, char *p, Py_ssize_t stride, const stored *tile, Py_ssize_t n) noexcept nogil:
    cdef double packet[PACKET]
    cdef Py_ssize_t i
    if v.storage == storage_as(tile):
        put_run(v, p, stride, tile, n)
    elif stored is float or stored is double:
        for i from 0 <= i < n by PACKET:
            narrow[stored](v.storage, tile + i, packet, min(n - i, PACKET))
            put_run(v, p + i * stride, stride, packet, min(n - i, PACKET))


cdef void move(const Job *job, const View *v, const Span *t, stored *tile, bint store) noexcept nogil:
    """Walk the runs of equal stride that make up a span, reading them into the tile or writing them from it."""
    cdef Py_ssize_t inner = v.shape[v.ndim - 1], stride = v.stride[v.ndim - 1], total = t.rows * t.lanes
    cdef Py_ssize_t c = t.c, s = t.s, done = 0, run
    cdef bint flat = v.ndim == 1 and v.channel_stride == job.S * stride
    if job.channels_last:
        stride = v.channel_stride
        flat = v.ndim == 1 and v.stride[0] == t.lanes * stride
    while done < total:
        run = total if flat else t.lanes if job.channels_last else min(total - done, inner - s % inner)
        if store:
            write_run[stored](v, address(v, t.n, c, s), stride, tile + done, run)
        else:
            read_run[stored](v, address(v, t.n, c, s), stride, tile + done, run)
        done += run
        s += 1 if job.channels_last else run
        if s == job.S and not job.channels_last:
            s = 0
            c += 1


cdef inline bint in_one_run(const Job *job, const View *v, const Span *t) noexcept nogil:
    """Whether the values of a span of channels-first follow one another in memory."""
    cdef Py_ssize_t inner = v.shape[v.ndim - 1]
    if v.stride[v.ndim - 1] != v.itemsize and inner != 1:
        return False
    return ((t.s if v.ndim == 1 else t.s % inner) + t.lanes <= inner
            or (v.ndim == 1 and v.channel_stride == job.S * v.itemsize))


cdef inline stored *direct(const Job *job, const View *v, const Span *t, stored *buffer,
                           Py_ssize_t *row) noexcept nogil:
    """Where to work on a span, and the distance of its rows: where it lies if it needs no conversion, else the buffer."""
    row[0] = t.lanes
    if v.storage != storage_as(buffer):
        return buffer
    if not job.channels_last:
        if not in_one_run(job, v, t):
            return buffer
    else:
        if (v.channel_stride != v.itemsize and job.C > 1) or v.ndim > 1 or v.stride[0] % v.itemsize:
            return buffer
        row[0] = v.stride[0] // v.itemsize
    return <stored *> address(v, t.n, t.c, t.s)


cdef inline stored *target(const Job *job, const View *v, const Span *t, stored *buffer) noexcept nogil:
    """Where to write a span's values: where they shall lie, unless they are to be converted, scattered or streamed from the buffer."""
    cdef Py_ssize_t row
    return buffer if v.streamed else direct(job, v, t, buffer, &row)


cdef inline stored *load_tile(const Job *job, const View *v, const Span *t, stored *buffer,
                              Py_ssize_t *row) noexcept nogil:
    cdef stored *tile = direct[stored](job, v, t, buffer, row)
    if tile == buffer:
        move[stored](job, v, t, tile, False)
    return tile


# ---- masks: a byte for each position, since they have one channel -----------------------------------


cdef const uint8_t *load_mask(const Job *job, Span t, uint8_t *buffer) noexcept nogil:
    """The mask of the positions of a span, or of its values in channels-first."""
    cdef const View *v = &job.mask
    cdef Py_ssize_t done = 0, inner = v.shape[v.ndim - 1], run, positions = t.rows if job.channels_last else t.lanes
    t.lanes = positions
    if in_one_run(job, v, &t) and (not job.channels_last or v.ndim == 1):
        return <const uint8_t *> address(v, t.n, t.c, t.s)
    while done < positions:
        run = min(positions - done, inner - t.s % inner)
        gather(address(v, t.n, t.c, t.s), v.stride[v.ndim - 1], 1, buffer + done, run)
        done += run
        t.s += run
        if t.s == job.S:
            t.s = 0
            t.c += 1
    return buffer


cdef Py_ssize_t counted(const Job *job, Span t, Py_ssize_t enough, uint8_t *buffer) noexcept nogil:
    """How many positions of a span count (in channels-first: values), or at least `enough`."""
    cdef Py_ssize_t count = 0, n = t.rows if job.channels_last else t.lanes, total, j
    cdef const uint8_t *mask
    if job.mask.data == NULL:
        return n
    while n > 0 and count < enough:
        total = min(n, TILE)
        if job.channels_last:
            t.rows = total
        else:
            t.lanes = total
        mask = load_mask(job, t, buffer)
        for j in range(total):
            count += mask[j] != 0
        n -= total
        forward(job, &t, total)
    return count


cdef inline void forward(const Job *job, Span *t, Py_ssize_t n) noexcept nogil:
    """Move the start of a span on by so many positions, in channels-first from channel to channel."""
    t.s += n
    if t.s >= job.S and not job.channels_last:
        t.c += t.s // job.S
        t.s %= job.S


cdef inline Py_ssize_t pack(const stored *x, Py_ssize_t row, const Span *t, const uint8_t *mask,
                            stored *tile) noexcept nogil:
    """Bring rows, or those that count, together in a tile, and return how many they are."""
    cdef Py_ssize_t r, count = 0
    for r in range(t.rows):
        if mask == NULL or mask[r] != 0:
            memmove(tile + count * t.lanes, x + r * row, t.lanes * sizeof(stored))
            count += 1
    return count


cdef inline Py_ssize_t pack_values(const stored *x, Py_ssize_t n, const uint8_t *mask, stored *tile) noexcept nogil:
    """The same of single values; mostly, many in a row count or don't."""
    cdef Py_ssize_t i = 0, j, count = 0
    cdef uint64_t eight, all_count = 0x01010101 * (<uint64_t> 0x100000001)
    while i < n:
        if n - i >= 8:
            memcpy(&eight, mask + i, 8)
            if eight == 0 or eight == all_count:
                if eight:
                    memmove(tile + count, x + i, 8 * sizeof(stored))
                    count += 8
                i += 8
                continue
        for j in range(i, min(i + 8, n)):
            tile[count] = x[j]
            count += mask[j] != 0
        i += 8
    return count

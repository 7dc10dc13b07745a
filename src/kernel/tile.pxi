# Tiles: some values of an array, where they lie or gathered in level 1; and their types. Strides, masks and mixed types
# live in this file and nowhere else.

cdef enum:
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


cdef inline void put_value(stored *p, double v) noexcept nogil:
    if stored is half:
        p[0] = gn_to_half(<float> v)
    elif stored is bfloat:
        p[0] = gn_to_bfloat(<float> v)
    else:
        p[0] = <stored> v


cdef inline void widen_from(const stored *memory, real *tile, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        tile[j] = <real> scalar(memory[j])


cdef inline void narrow_to(stored *memory, const real *tile, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        put_value(memory + j, tile[j])


cdef void widen(Storage storage, const void *memory, real *tile, Py_ssize_t n) noexcept nogil:
    if storage == FLOAT16:
        widen_from(<const half *> memory, tile, n)
    elif storage == BFLOAT16:
        widen_from(<const bfloat *> memory, tile, n)
    elif storage == FLOAT32:
        widen_from(<const float *> memory, tile, n)
    else:
        widen_from(<const double *> memory, tile, n)


cdef void narrow(Storage storage, const real *tile, void *memory, Py_ssize_t n) noexcept nogil:
    if storage == FLOAT16:
        narrow_to(<half *> memory, tile, n)
    elif storage == BFLOAT16:
        narrow_to(<bfloat *> memory, tile, n)
    elif storage == FLOAT32:
        narrow_to(<float *> memory, tile, n)
    else:
        narrow_to(<double *> memory, tile, n)


# Values move in the type they have: another of the same size would break C's aliasing rule.

ctypedef fused word:  # of so many bytes, whatever is in it
    float
    double
    uint16_t
    uint8_t


cdef inline void gather_words(const char *p, Py_ssize_t stride, word *packet, Py_ssize_t n) noexcept nogil:
    cdef word one = (<const word *> p)[0]
    cdef Py_ssize_t j
    if stride == 0:  # a loop of its own, as compilers make vectors of it
        for j in range(n):
            packet[j] = one
    else:
        for j in range(n):
            packet[j] = (<const word *> (p + j * stride))[0]


cdef void gather(const char *p, Py_ssize_t stride, Py_ssize_t size, void *packet, Py_ssize_t n) noexcept nogil:
    """Some values, at least one."""
    if size == 4:
        gather_words(p, stride, <float *> packet, n)
    elif size == 8:
        gather_words(p, stride, <double *> packet, n)
    elif size == 2:
        gather_words(p, stride, <uint16_t *> packet, n)
    else:
        gather_words(p, stride, <uint8_t *> packet, n)


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


cdef inline void forward(const Job *job, Span *t, Py_ssize_t n) noexcept nogil:
    """Move the start of a span on by so many positions, in channels-first from channel to channel."""
    t.s += n
    if t.s >= job.S and not job.channels_last:
        t.c += t.s // job.S
        t.s %= job.S


cdef inline Py_ssize_t step_of(const Job *job, const View *v) noexcept nogil:
    """Bytes from value to value of a run."""
    return v.channel_stride if job.channels_last else v.stride[v.ndim - 1]


cdef inline Py_ssize_t run_at(const Job *job, const View *v, const Span *t, Py_ssize_t s, Py_ssize_t left) noexcept nogil:
    """How many of the values left of a span, from position s on, are a step apart."""
    cdef Py_ssize_t inner = v.shape[v.ndim - 1]
    if job.channels_last:
        return left if v.ndim == 1 and v.stride[0] == t.lanes * v.channel_stride else t.lanes
    return left if v.ndim == 1 and v.channel_stride == job.S * v.stride[0] else min(left, inner - s % inner)


cdef void read_tile(const Job *job, const View *v, const Span *t, stored *tile) noexcept nogil:
    cdef Py_ssize_t left = t.rows * t.lanes, run
    cdef Span at = t[0]
    while left > 0:
        run = run_at(job, v, t, at.s, left)
        read_run(v, address(v, at.n, at.c, at.s), step_of(job, v), tile, run)
        tile += run
        left -= run
        forward(job, &at, 1 if job.channels_last else run)


cdef void write_tile(const Job *job, const View *v, const Span *t, const stored *tile) noexcept nogil:
    cdef Py_ssize_t left = t.rows * t.lanes, run
    cdef Span at = t[0]
    while left > 0:
        run = run_at(job, v, t, at.s, left)
        write_run(v, address(v, at.n, at.c, at.s), step_of(job, v), tile, run)
        tile += run
        left -= run
        forward(job, &at, 1 if job.channels_last else run)


cdef inline bint in_one_run(const Job *job, const View *v, const Span *t) noexcept nogil:
    """Whether the values of a span of channels-first follow one another in memory."""
    cdef Py_ssize_t inner = v.shape[v.ndim - 1]
    if v.stride[v.ndim - 1] != v.itemsize and inner != 1:
        return False
    return ((t.s if v.ndim == 1 else t.s % inner) + t.lanes <= inner
            or (v.ndim == 1 and v.channel_stride == job.S * v.itemsize))


cdef inline stored *direct(const Job *job, const View *v, const Span *t, stored *buffer,
                           Py_ssize_t *row) noexcept nogil:
    """Where to work on a span, and the distance of its rows: where it lies if it needs no conversion, else the
    buffer."""
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
    """Where to write a span's values: where they shall lie, unless they are to be converted, scattered or streamed from
    the buffer."""
    cdef Py_ssize_t row
    return buffer if v.streamed or job.channels_last else direct(job, v, t, buffer, &row)


cdef inline const stored *load_tile(const Job *job, const View *v, const Span *t, stored *buffer,
                                    Py_ssize_t *row) noexcept nogil:
    """A span's values, where they lie or in the buffer; NULL for an array that is absent."""
    cdef const stored *tile = NULL
    if v.data != NULL:
        tile = direct(job, v, t, buffer, row)
        if tile == buffer:
            read_tile(job, v, t, buffer)
    return tile


cdef inline const stored *packed(const Job *job, const View *v, const Span *t, stored *buffer) noexcept nogil:
    """The same, with rows one behind the other."""
    cdef Py_ssize_t row = 0
    cdef const stored *tile = load_tile(job, v, t, buffer, &row)
    if row != t.lanes and tile != NULL:
        pack(tile, row, t, NULL, buffer)
        return buffer
    return tile


# ---- masks: a byte for each position, since they have one channel -----------------------------------


cdef const uint8_t *load_mask(const Job *job, Span t, uint8_t *buffer) noexcept nogil:
    """The mask of the positions of a span, or of its values in channels-first; NULL if there is none."""
    cdef const View *v = &job.mask
    cdef Py_ssize_t done = 0, inner, run, positions = t.rows if job.channels_last else t.lanes
    if v.data == NULL:
        return NULL
    inner = v.shape[v.ndim - 1]
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
    return buffer


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

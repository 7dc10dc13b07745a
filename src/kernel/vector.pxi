# The vectors of vector.h as Cython sees them: one name for what is done to vectors of float32 or float64, and to values
# of any type in memory. `like` is any vector of the wanted type; compilers drop it.

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy, memmove, memset

cdef extern from "vector.h" nogil:
    ctypedef struct half "gn_half":
        pass
    ctypedef struct bfloat "gn_bfloat":
        pass
    ctypedef float floats "gn_floats"
    ctypedef double doubles "gn_doubles"
    enum:
        FLOATS "GN_FLOATS"
        DOUBLES "GN_DOUBLES"
    float gn_from_half(half)
    half gn_to_half(float)
    float gn_from_bfloat(bfloat)
    bfloat gn_to_bfloat(float)
    floats gn_all_floats(float)
    doubles gn_all_doubles(double)
    floats gn_abs_floats(floats)
    doubles gn_abs_doubles(doubles)
    floats gn_exponent_floats(floats)
    doubles gn_exponent_doubles(doubles)
    floats gn_fma_floats(floats, floats, floats)
    doubles gn_fma_doubles(doubles, doubles, doubles)
    doubles gn_sqrt_doubles(doubles)
    bint gn_any_less(doubles, doubles)
    floats gn_least_floats(floats, floats)
    doubles gn_least_doubles(doubles, doubles)
    floats gn_most_floats(floats, floats)
    doubles gn_most_doubles(doubles, doubles)
    floats gn_where_at_most_floats(floats, floats, floats, floats)
    doubles gn_where_at_most_doubles(doubles, doubles, doubles, doubles)
    floats gn_floats_of_float(const float *)
    floats gn_floats_of_half(const half *)
    floats gn_floats_of_bfloat(const bfloat *)
    doubles gn_doubles_of_double(const double *)
    doubles gn_doubles_of_float(const float *)
    doubles gn_doubles_of_half(const half *)
    doubles gn_doubles_of_bfloat(const bfloat *)
    void gn_floats_to_float(float *, floats, bint)
    void gn_floats_to_half(half *, floats, bint)
    void gn_floats_to_bfloat(bfloat *, floats, bint)
    void gn_doubles_to_double(double *, doubles, bint)
    void gn_add_floats(double *, floats)
    void gn_put_floats(double *, floats)
    void gn_add_doubles(double *, doubles)
    void gn_total(const double *, double *, double *)
    void gn_total_floats(const floats *, const floats *, double *, double *)
    void gn_assume(bint)
    void gn_prefetch(const void *)
    Py_ssize_t gn_before_line(const void *)
    void gn_stream(void *, const void *, size_t)

ctypedef fused real:  # the compute types
    float
    double

ctypedef fused stored:  # the types of values in memory
    float
    double
    half
    bfloat

ctypedef fused vec:
    floats
    doubles


cdef inline Py_ssize_t width(vec like) noexcept nogil:
    return FLOATS if vec is floats else DOUBLES


cdef inline vec all_of(double v, vec like) noexcept nogil:
    if vec is floats:
        return gn_all_floats(<float> v)
    else:
        return gn_all_doubles(v)


cdef inline vec absolute(vec a) noexcept nogil:
    if vec is floats:
        return gn_abs_floats(a)
    else:
        return gn_abs_doubles(a)


cdef inline vec fma(vec a, vec b, vec c) noexcept nogil:
    if vec is floats:
        return gn_fma_floats(a, b, c)
    else:
        return gn_fma_doubles(a, b, c)


cdef inline vec least(vec a, vec b) noexcept nogil:
    """a where it is less than b; b where one is NaN."""
    if vec is floats:
        return gn_least_floats(a, b)
    else:
        return gn_least_doubles(a, b)


cdef inline vec most(vec a, vec b) noexcept nogil:
    """a where it is more than b; b where one is NaN."""
    if vec is floats:
        return gn_most_floats(a, b)
    else:
        return gn_most_doubles(a, b)


cdef inline vec where_at_most(vec a, vec b, vec x, vec y) noexcept nogil:
    """x where a <= b, else y."""
    if vec is floats:
        return gn_where_at_most_floats(a, b, x, y)
    else:
        return gn_where_at_most_doubles(a, b, x, y)


cdef inline vec load(const stored *p, vec like) noexcept nogil:
    if vec is floats:
        if stored is float:
            return gn_floats_of_float(p)
        elif stored is half:
            return gn_floats_of_half(p)
        elif stored is bfloat:
            return gn_floats_of_bfloat(p)
        else:
            return like  # nobody asks
    else:
        if stored is float:
            return gn_doubles_of_float(p)
        elif stored is half:
            return gn_doubles_of_half(p)
        elif stored is bfloat:
            return gn_doubles_of_bfloat(p)
        else:
            return gn_doubles_of_double(p)


cdef inline void store(stored *p, vec v, bint stream) noexcept nogil:
    if vec is floats:
        if stored is float:
            gn_floats_to_float(p, v, stream)
        elif stored is half:
            gn_floats_to_half(p, v, stream)
        elif stored is bfloat:
            gn_floats_to_bfloat(p, v, stream)
    else:
        if stored is double:
            gn_doubles_to_double(p, v, stream)


cdef inline const stored *after(const stored *p, Py_ssize_t i) noexcept nogil:
    """The values from the i-th on, if there are any."""
    return p if p == NULL else p + i


cdef inline vec load_some(const stored *p, Py_ssize_t n, vec like) noexcept nogil:
    """Fewer values than a vector has; the others are 0."""
    cdef stored full[16]
    memset(full, 0, sizeof(full))
    memcpy(full, p, n * sizeof(stored))
    return load(<const stored *> full, like)


cdef inline void store_some(stored *p, vec v, Py_ssize_t n) noexcept nogil:
    cdef stored full[16]
    store(<stored *> full, v, False)
    memcpy(p, full, n * sizeof(stored))


# Of so many values: a vector, if that is what n is known to be, or fewer.

cdef inline vec some_of(const stored *p, Py_ssize_t n, vec like) noexcept nogil:
    return load(p, like) if n == width(like) else load_some(p, n, like)


cdef inline vec few_of(const stored *p, Py_ssize_t n, vec like) noexcept nogil:
    """The same for what is applied: in place of those that are absent is one that is there, so that what is made of
    them raises nothing."""
    cdef stored full[16]
    cdef Py_ssize_t j
    if n == width(like):
        return load(p, like)
    for j in range(width(like)):
        full[j] = p[0]
    memcpy(full, p, n * sizeof(stored))
    return load(<const stored *> full, like)


cdef inline void store_few(stored *p, vec v, Py_ssize_t n, bint stream) noexcept nogil:
    if n == width(v):
        store(p, v, stream)
    else:
        store_some(p, v, n)


# Arrays of the compute type, which is not always the values'.

cdef inline vec some_lanes(const void *parameters, Py_ssize_t i, Py_ssize_t n, vec like) noexcept nogil:
    if vec is floats:
        return some_of(<const float *> parameters + i, n, like)
    else:
        return some_of(<const double *> parameters + i, n, like)


cdef inline vec few_lanes(const void *parameters, Py_ssize_t i, Py_ssize_t n, vec like) noexcept nogil:
    if vec is floats:
        return few_of(<const float *> parameters + i, n, like)
    else:
        return few_of(<const double *> parameters + i, n, like)


cdef inline void put_lane(void *parameters, Py_ssize_t i, vec v) noexcept nogil:
    if vec is floats:
        gn_floats_to_float(<float *> parameters + i, v, False)
    else:
        gn_doubles_to_double(<double *> parameters + i, v, False)


cdef inline void put_lanes(double *sums, vec v) noexcept nogil:
    """Widened, if they are floats."""
    if vec is floats:
        gn_put_floats(sums, v)
    else:
        gn_doubles_to_double(sums, v, False)


cdef inline void add_lanes(double *sums, vec v) noexcept nogil:
    if vec is floats:
        gn_add_floats(sums, v)
    else:
        gn_add_doubles(sums, v)


cdef inline void put(void *to, Py_ssize_t i, double v, vec like) noexcept nogil:
    if vec is floats:
        (<float *> to)[i] = <float> v
    else:
        (<double *> to)[i] = v

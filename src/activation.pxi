# The activations and their derivatives, for float and double, of a value or over a tile; the memory walks live in the
# kernel, which includes this file and declares `real` and `Activation`. Only + - * /, comparisons and shifts, no
# libm: every compiler and ISA level gives the same bits. Constants are cast to `real`, or C would compute in double;
# cdivision must be on, or the loops do not vectorise.
#
# silu, gelu and gelu_tanh are z S(z) with S(-z) = 1 - S(z), so that with a = |z| and T(a) = a S(-a)
#
#     act(z) = relu(z) - T(a)        act'(z) = T'(a) if z < 0 else 1 - T'(a)
#
# T falls as an exponential and is all of act(z) in the negative tail, where it keeps its relative accuracy down to
# the subnormals; for z > 0 nothing cancels, as T <= z/2. Each T is one fraction with one exponential in it.
#
# Worst errors in ulp: float at every 2^-14 <= |z| < 2^8 and every 61st of the others, double at 10^6 random points.
# Those of act', whose zeros forbid a relative bound, at the scale max(|act'|, 1/8).
#
#               silu   gelu   gelu_tanh   mish
#     float     3.4    3.9    3.4         3.9    act
#               4.7    4.1    5.1         6.4    act'
#     double    3.0    3.9    2.7         3.5    act
#               3.8    4.3    4.3         6.0    act'

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline real at_most(real x, real bound) noexcept nogil:
    return bound if x > bound else x        # NaN stays


cdef inline real relu(real z) noexcept nogil:
    return <real>0 if z < 0 else z          # NaN stays


cdef inline real relu_gradient(real z, real dy) noexcept nogil:
    return <real>0 if z <= 0 else dy        # as PyTorch, which lets dy pass where z is NaN


cdef inline real unfold(real z, real tail) noexcept nogil:
    return tail if z < 0 else <real>1 - tail


cdef inline real unity(real x) noexcept nogil:
    """What stands for 1 beside exp_minus: it keeps exp(-x) normal wherever an activation is not 0, and its square
    times exp(22) finite."""
    if real is float:
        return <real>(2.0**36)
    else:
        return <real>(2.0**200)


cdef inline real exp_minus(real x, real excess) noexcept nogil:
    """unity exp(excess - x) for -20 <= x <= 112 (float) or 850 (double)."""
    cdef real t, n, r, q
    cdef uint32_t bits32
    cdef uint64_t bits64
    # exp(-x) = 2^n exp(-r) with n = -round(x / ln 2). Adding 1.5 * 2^23 (2^52) rounds and leaves n in the low bits,
    # here with the bias of the exponent and the log of unity, to be shifted into place. ln 2 = high + low (Cody &
    # Waite 1980), high short enough for x + n high to be exact: 16 bits beside 8 of n, 42 beside 11.
    # exp(-r) = 1 - r + r^2 q(r) on |r| <= ln(2)/2, q by Remez exchange for the least relative error of the sum:
    # 2^-28.2 (float), 2^-57.9 (double).
    if real is float:
        t = <real>(1.5 * 2.0**23 + 127 + 36) - (x - excess) * <real>1.4426950408889634
        n = t - <real>(1.5 * 2.0**23 + 127 + 36)
        r = (x + n * <real>(45426.0 / 2.0**16) - excess) + n * <real>1.4286068203094172e-6
        q = ((<real>4.99999934e-1 - <real>1.66665195e-1 * r)
             + r * r * ((<real>4.16684011e-2 - <real>8.36885108e-3 * r) + <real>1.38143199e-3 * (r * r)))
        memcpy(&bits32, &t, 4)
        bits32 <<= 23
        memcpy(&t, &bits32, 4)
    else:
        t = <real>(1.5 * 2.0**52 + 1023 + 200) - (x - excess) * <real>1.4426950408889634
        n = t - <real>(1.5 * 2.0**52 + 1023 + 200)
        r = (x + n * <real>(3048493539143.0 / 2.0**42) - excess) + n * <real>5.4979230187083712e-14
        q = ((((((((<real>-2.4999857366796424e-8 * r + <real>2.7630523482066208e-7) * r
             - <real>2.7557588425328419e-6) * r + <real>2.4801492388265001e-5) * r
             - <real>1.9841269502734520e-4) * r + <real>1.3888888944249190e-3) * r
             - <real>8.3333333334969279e-3) * r + <real>4.1666666666528104e-2) * r
             - <real>1.6666666666666408e-1) * r + <real>5.0000000000000108e-1
        memcpy(&bits64, &t, 8)
        bits64 <<= 52
        memcpy(&t, &bits64, 8)
    return (<real>1 - (r - r * r * q)) * t


cdef inline void erfcx(real a, real *p, real *q) noexcept nogil:
    """erfcx(a/sqrt 2) = 2 exp(a^2/2) Phi(-a) = p/q, q = p + a p + a k: as |k/p| < 0.26 the errors of k are small and
    those of p cancel. By Remez exchange for the least relative error, 2^-27.5 on a <= 13.3 (float), 2^-59.9 on 39."""
    cdef real k
    if real is float:
        p[0] = (((a + <real>9.97266158) * a + <real>45.2980784) * a + <real>109.000034) * a + <real>125.287192
        k = ((((<real>0.253295789 * a + <real>1.52715926) * a + <real>2.7342216) * a - <real>4.91428248) * a
             - <real>25.3224455)
    else:
        p[0] = ((((((((((a + <real>31.135881352181581) * a + <real>475.89080668336595) * a
                + <real>4644.5798057632182) * a + <real>31829.81742570136) * a
                + <real>159435.39001038595) * a + <real>590406.70625644014) * a
                + <real>1598163.8558937765) * a + <real>3040156.1267958796) * a
                + <real>3704500.6614464666) * a + <real>2237788.0810557716)
        k = ((((((((((<real>0.25331413731520924 * a + <real>6.8871589243532485) * a
             + <real>90.66730192934358) * a + <real>739.66996074501981) * a
             + <real>4012.2969634860515) * a + <real>14300.492964356416) * a
             + <real>28835.371099264514) * a + <real>3001.7329983631475) * a
             - <real>162003.08010903181) * a - <real>443010.679953616) * a
             - <real>452291.52083270007)
    q[0] = p[0] + (a * p[0] + a * k)


cdef inline real exp_silu(real z, real *a) noexcept nogil:
    """exp(-a), a = |z| up to where T(a) rounds to 0."""
    if real is float:
        a[0] = at_most(abs(z), <real>110)
    else:
        a[0] = at_most(abs(z), <real>755)
    return exp_minus(a[0], <real>0)


cdef inline real exp_gelu(real z, real *a) noexcept nogil:
    """exp(-a^2/2): the square of a rounded to 2^-8 (2^-21) is exact, the rest is excess."""
    cdef real near
    if real is float:
        a[0] = at_most(abs(z), <real>14.5)
        near = (a[0] + <real>(1.5 * 2.0**15)) - <real>(1.5 * 2.0**15)
    else:
        a[0] = at_most(abs(z), <real>39)
        near = (a[0] + <real>(1.5 * 2.0**31)) - <real>(1.5 * 2.0**31)
    return exp_minus(<real>0.5 * near * near, <real>0.5 * (near - a[0]) * (near + a[0]))


cdef inline real exp_gelu_tanh(real z, real *a) noexcept nogil:
    """exp(-w), w = 2 sqrt(2/pi) (a + 0.044715 a^3) = c1 a + c3 a^3."""
    cdef real m, w, gap, near, excess
    # w is exact at near = m h, m = round(a/h), with h such that c3 h^3 = 2^-17 (2^-43) and c1 h cut to a multiple of
    # that; the cut and w(near) - w(a) = (near - a) (c1 + c3 (near^2 + near a + a^2)) are excess. h = high + low.
    if real is float:
        a[0] = at_most(abs(z), <real>10.875)
        m = (a[0] * <real>21.0690234 + <real>(1.5 * 2.0**23)) - <real>(1.5 * 2.0**23)
        w = m * (<real>(9927.0 / 2.0**17) + <real>(1.0 / 2.0**17) * (m * m))
        gap = (m * <real>(49769.0 / 2.0**20) - a[0]) - m * <real>3.72401736e-7
        excess = m * <real>-3.06156052e-6
    else:
        a[0] = at_most(abs(z), <real>21.75)
        m = (a[0] * <real>8561.9174304513864 + <real>(1.5 * 2.0**52)) - <real>(1.5 * 2.0**52)
        w = m * (<real>(1639414740.0 / 2.0**43) + <real>(1.0 / 2.0**43) * (m * m))
        gap = (m * <real>(32875226723.0 / 2.0**48) - a[0]) + m * <real>3.9879801159344763e-16
        excess = m * <real>3.3643904729883367e-14
    near = a[0] + gap
    excess += gap * (<real>1.5957691216057308
                     + <real>0.07135481627260025 * (near * near + near * a[0] + a[0] * a[0]))
    return exp_minus(w, excess)


cdef inline real silu(real z) noexcept nogil:
    cdef real a, e
    e = exp_silu(z, &a)
    return relu(z) - a * e / (unity(z) + e)


cdef inline real gelu(real z) noexcept nogil:
    cdef real a, e, p, q
    e = exp_gelu(z, &a)
    erfcx(a, &p, &q)
    return relu(z) - a * p * e / ((unity(z) + unity(z)) * q)


cdef inline real gelu_tanh(real z) noexcept nogil:
    cdef real a, e
    e = exp_gelu_tanh(z, &a)
    return relu(z) - a * e / (unity(z) + e)


cdef inline real logistic_slope(real b, real e) noexcept nogil:
    """T' of T = a e/(1 + e), e = exp(-w): e (e + b)/(1 + e)^2, b = 1 - a w'."""
    cdef real one = unity(b)
    return e * (e + b * one) / ((one + e) * (one + e))


cdef inline real silu_slope(real z) noexcept nogil:
    cdef real a, e
    e = exp_silu(z, &a)
    return unfold(z, logistic_slope(<real>1 - a, e))


cdef inline real gelu_slope(real z) noexcept nogil:
    """T' = Phi(-a) - a phi(a)."""
    cdef real a, e, p, q
    e = exp_gelu(z, &a)
    erfcx(a, &p, &q)
    return unfold(z, e * (<real>0.5 * p - <real>0.3989422804014327 * a * q) / (unity(z) * q))


cdef inline real gelu_tanh_slope(real z) noexcept nogil:
    cdef real a, e, b
    e = exp_gelu_tanh(z, &a)
    b = (<real>1 - <real>1.5957691216057308 * a) - <real>0.2140644488178007 * (a * a * a)
    return unfold(z, logistic_slope(b, e))


# mish has no such symmetry. With e = exp(z) and n = e (e + 2), tanh(log(1 + e)) = n/(n + 2) cancels nowhere.


cdef inline real exp_mish(real z, real *c) noexcept nogil:
    """exp(c), c = z from where mish rounds to 0 to where it rounds to z."""
    cdef real x = -z
    if real is float:
        x = at_most(x, <real>110)
        x = <real>-11 if x < -11 else x
    else:
        x = at_most(x, <real>755)
        x = <real>-20 if x < -20 else x
    c[0] = -x
    return exp_minus(x, <real>0)


cdef inline real mish(real z) noexcept nogil:
    cdef real c, e, n, one = unity(z)
    e = exp_mish(z, &c)
    n = e * e + e * (one + one)
    return c * n / (n + (one + one) * one) if z <= c else z  # NaN stays


cdef inline real mish_slope(real z) noexcept nogil:
    """(n (n + 2) + 4 z e (e + 1))/(n + 2)^2 = e (4 (1 + z) + (6 + 4 z) e + 4 e^2 + e^3)/(n + 2)^2."""
    cdef real c, e, d
    e = exp_mish(z, &c) / unity(z)
    d = e * e + (e + e) + <real>2
    return z if z != z else e * (((e + <real>4) * e + (<real>4 * c + <real>6)) * e + <real>4 * (c + <real>1)) / (d * d)


cdef inline real activated(int kind, real z) noexcept nogil:
    """act(z), for a kind known to the compiler."""
    if kind == RELU:
        return relu(z)
    elif kind == SILU:
        return silu(z)
    elif kind == GELU:
        return gelu(z)
    elif kind == GELU_TANH:
        return gelu_tanh(z)
    elif kind == MISH:
        return mish(z)
    return z


cdef inline real dy_before(int kind, real z, real dy) noexcept nogil:
    """dy * act'(z), for a kind known to the compiler."""
    if kind == RELU:
        return relu_gradient(z, dy)
    elif kind == SILU:
        return dy * silu_slope(z)
    elif kind == GELU:
        return dy * gelu_slope(z)
    elif kind == GELU_TANH:
        return dy * gelu_tanh_slope(z)
    return dy * mish_slope(z)


cdef inline void activate_gradient_as(int kind, const real *z, const real *dy, real *to, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        to[j] = dy_before(kind, z[j], dy[j])


cdef void activate_gradient(int kind, const real *z, const real *dy, real *to, Py_ssize_t n) noexcept nogil:
    """dy * act'(z), to where dy lies or elsewhere."""
    if kind == RELU:
        activate_gradient_as(RELU, z, dy, to, n)
    elif kind == SILU:
        activate_gradient_as(SILU, z, dy, to, n)
    elif kind == GELU:
        activate_gradient_as(GELU, z, dy, to, n)
    elif kind == GELU_TANH:
        activate_gradient_as(GELU_TANH, z, dy, to, n)
    elif kind == MISH:
        activate_gradient_as(MISH, z, dy, to, n)

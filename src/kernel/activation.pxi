# The activations and their derivatives, of a vector. Only + - * /, fma, comparisons and shifts, no libm: every compiler
# and every processor with fma gives the same bits.
#
# silu, gelu and gelu_tanh are z S(z) with S(-z) = 1 - S(z), so that with a = |z| and T(a) = a S(-a)
#
#     act(z) = relu(z) - T(a)        act'(z) = T'(a) if z <= 0 else 1 - T'(a)
#
# T falls as an exponential and is all of act(z) in the negative tail, where it keeps its relative accuracy down to
# the subnormals; for z > 0 nothing cancels, as T <= z/2. Each T is one fraction with one exponential in it.

cdef inline vec step(vec p, vec x, double c) noexcept nogil:
    """p x + c: of Horner's scheme."""
    return fma(p, x, all_of(c, x))


cdef inline vec times(double c, vec x) noexcept nogil:
    return all_of(c, x) * x


cdef inline vec relu(vec z) noexcept nogil:
    return most(all_of(0, z), z)  # NaN stays


cdef inline vec unfold(vec z, vec tail) noexcept nogil:
    return where_at_most(z, all_of(0, z), tail, all_of(1, z) - tail)


cdef inline vec unity(vec like) noexcept nogil:
    """What stands for 1 beside exp_minus: it keeps exp(-x) normal wherever an activation is not 0, and its square
    times exp(22) finite."""
    return all_of(2.0**36 if vec is floats else 2.0**200, like)


cdef inline vec exp_parts(vec x, vec excess, vec *t) noexcept nogil:
    """unity exp(excess - x) for -20 <= x <= 112 (float) or 850 (double), as t + g t."""
    # exp(-x) = 2^n exp(-r) with n = -round(x / ln 2). Adding 1.5 * 2^23 (2^52) rounds and leaves n in the low bits,
    # here with the bias of the exponent and the log of unity, to be shifted into place. ln 2 = high + low (Cody &
    # Waite 1980), high short enough for x + n high to be exact: 16 bits beside 8 of n, 42 beside 11.
    # exp(-r) = 1 - r + r^2 q(r) on |r| <= ln(2)/2, q by Remez exchange for the least relative error of the sum:
    # 2^-28.2 (float), 2^-57.9 (double).
    cdef vec n, r, q
    if vec is floats:
        t[0] = fma(x - excess, all_of(-1.4426950408889634, x), all_of(1.5 * 2.0**23 + 127 + 36, x))
        n = t[0] - all_of(1.5 * 2.0**23 + 127 + 36, x)
        r = fma(n, all_of(1.4286068203094172e-6, x), fma(n, all_of(45426.0 / 2.0**16, x), x) - excess)
        q = step(step(step(step(all_of(1.38143199e-3, r), r, -8.36885108e-3), r, 4.16684011e-2), r, -1.66665195e-1), r,
                 4.99999934e-1)
        t[0] = gn_exponent_floats(t[0])
    else:
        t[0] = fma(x - excess, all_of(-1.4426950408889634, x), all_of(1.5 * 2.0**52 + 1023 + 200, x))
        n = t[0] - all_of(1.5 * 2.0**52 + 1023 + 200, x)
        r = fma(n, all_of(5.4979230187083712e-14, x), fma(n, all_of(3048493539143.0 / 2.0**42, x), x) - excess)
        q = step(step(step(all_of(-2.4999857366796424e-8, r), r, 2.7630523482066208e-7), r, -2.7557588425328419e-6), r,
                 2.4801492388265001e-5)
        q = step(step(step(q, r, -1.9841269502734520e-4), r, 1.3888888944249190e-3), r, -8.3333333334969279e-3)
        q = step(step(step(q, r, 4.1666666666528104e-2), r, -1.6666666666666408e-1), r, 5.0000000000000108e-1)
        t[0] = gn_exponent_doubles(t[0])
    return fma(r * r, q, -r)


cdef inline vec exp_minus(vec x, vec excess) noexcept nogil:
    cdef vec t, g
    g = exp_parts(x, excess, &t)
    return fma(g, t, t)


cdef inline void erfcx(vec a, vec *p, vec *q) noexcept nogil:
    """erfcx(a/sqrt 2) = 2 exp(a^2/2) Phi(-a) = p/q, q = p + a p + a k: as |k/p| < 0.26 the errors of k are small and
    those of p cancel. By Remez exchange for the least relative error, 2^-27.5 on a <= 13.3 (float), 2^-59.9 on 39."""
    cdef vec k
    if vec is floats:
        p[0] = step(step(step(a + all_of(9.97266158, a), a, 45.2980784), a, 109.000034), a, 125.287192)
        k = step(step(step(step(all_of(0.253295789, a), a, 1.52715926), a, 2.7342216), a, -4.91428248), a, -25.3224455)
    else:
        p[0] = step(step(step(a + all_of(31.135881352181581, a), a, 475.89080668336595), a, 4644.5798057632182), a,
                    31829.81742570136)
        p[0] = step(step(step(p[0], a, 159435.39001038595), a, 590406.70625644014), a, 1598163.8558937765)
        p[0] = step(step(step(p[0], a, 3040156.1267958796), a, 3704500.6614464666), a, 2237788.0810557716)
        k = step(step(step(all_of(0.25331413731520924, a), a, 6.8871589243532485), a, 90.66730192934358), a,
                 739.66996074501981)
        k = step(step(step(k, a, 4012.2969634860515), a, 14300.492964356416), a, 28835.371099264514)
        k = step(step(step(step(k, a, 3001.7329983631475), a, -162003.08010903181), a, -443010.679953616), a,
                 -452291.52083270007)
    q[0] = fma(a, p[0] + k, p[0])


cdef inline vec exp_silu(vec z, vec *a) noexcept nogil:
    """exp(-a), a = |z| up to where T(a) rounds to 0."""
    a[0] = least(all_of(110 if vec is floats else 755, z), absolute(z))  # NaN stays
    return exp_minus(a[0], all_of(0, z))


cdef inline vec exp_gelu(vec z, vec *a) noexcept nogil:
    """exp(-a^2/2): the square of a rounded to 2^-8 (2^-21) is exact, the rest is excess."""
    cdef vec near, much = all_of(1.5 * 2.0**15 if vec is floats else 1.5 * 2.0**31, z)
    a[0] = least(all_of(14.5 if vec is floats else 39, z), absolute(z))
    near = (a[0] + much) - much
    return exp_minus(times(0.5, near) * near, times(0.5, near - a[0]) * (near + a[0]))


cdef inline vec exp_gelu_tanh(vec z, vec *a) noexcept nogil:
    """exp(-w), w = 2 sqrt(2/pi) (a + 0.044715 a^3) = c1 a + c3 a^3."""
    # w is exact at near = m h, m = round(a/h), with h such that c3 h^3 = 2^-17 (2^-43) and c1 h cut to a multiple of
    # that; the cut and w(near) - w(a) = (near - a) (c1 + c3 (near^2 + near a + a^2)) are excess. h = high + low.
    cdef vec m, w, gap, near, much = all_of(1.5 * 2.0**23 if vec is floats else 1.5 * 2.0**52, z)
    a[0] = least(all_of(10.875 if vec is floats else 21.75, z), absolute(z))
    if vec is floats:
        m = (times(21.0690234, a[0]) + much) - much
        w = m * (all_of(9927.0 / 2.0**17, m) + times(1.0 / 2.0**17, m * m))
        gap = fma(m, all_of(-3.72401736e-7, m), times(49769.0 / 2.0**20, m) - a[0])
        near = a[0] + gap
        m = times(-3.06156052e-6, m)
    else:
        m = (times(8561.9174304513864, a[0]) + much) - much
        w = m * (all_of(1639414740.0 / 2.0**43, m) + times(1.0 / 2.0**43, m * m))
        gap = fma(m, all_of(3.9879801159344763e-16, m), times(32875226723.0 / 2.0**48, m) - a[0])
        near = a[0] + gap
        m = times(3.3643904729883367e-14, m)
    return exp_minus(w, fma(gap, step(fma(near, near + a[0], a[0] * a[0]), all_of(0.07135481627260025, near),
                                      1.5957691216057308), m))


cdef inline vec silu(vec z) noexcept nogil:
    cdef vec a, e
    e = exp_silu(z, &a)
    return relu(z) - a * e / (unity(z) + e)


cdef inline vec gelu(vec z) noexcept nogil:
    cdef vec a, e, p, q
    e = exp_gelu(z, &a)
    erfcx(a, &p, &q)
    return relu(z) - a * p * e / (times(2, unity(z)) * q)


cdef inline vec gelu_tanh(vec z) noexcept nogil:
    cdef vec a, e
    e = exp_gelu_tanh(z, &a)
    return relu(z) - a * e / (unity(z) + e)


cdef inline vec logistic_slope(vec b, vec e) noexcept nogil:
    """T' of T = a e/(1 + e), e = exp(-w): e (e + b)/(1 + e)^2, b = 1 - a w'."""
    return e * fma(b, unity(b), e) / ((unity(b) + e) * (unity(b) + e))


cdef inline vec silu_slope(vec z) noexcept nogil:
    cdef vec a, e
    e = exp_silu(z, &a)
    return unfold(z, logistic_slope(all_of(1, a) - a, e))


cdef inline vec gelu_slope(vec z) noexcept nogil:
    """T' = Phi(-a) - a phi(a)."""
    cdef vec a, e, p, q
    e = exp_gelu(z, &a)
    erfcx(a, &p, &q)
    return unfold(z, e * (times(0.5, p) - times(0.3989422804014327, a) * q) / (unity(z) * q))


cdef inline vec gelu_tanh_slope(vec z) noexcept nogil:
    cdef vec a, e, b
    e = exp_gelu_tanh(z, &a)
    b = (all_of(1, a) - times(1.5957691216057308, a)) - times(0.2140644488178007, a * a * a)
    return unfold(z, logistic_slope(b, e))


# mish has no such symmetry. With e = exp(z) and n = e (e + 2), tanh(log(1 + e)) = n/(n + 2) cancels nowhere.


cdef inline vec exp_mish(vec z, vec *c) noexcept nogil:
    """exp(c), c = z from where mish rounds to 0 to where it rounds to z."""
    cdef vec x = least(all_of(110 if vec is floats else 755, z), -z)
    x = most(all_of(-11 if vec is floats else -20, z), x)
    c[0] = -x
    return exp_minus(x, all_of(0, z))


cdef inline vec mish(vec z) noexcept nogil:
    cdef vec c, e, n
    e = exp_mish(z, &c)
    n = e * e + e * times(2, unity(z))
    return where_at_most(z, c, c * n / (n + times(2, unity(z)) * unity(z)), z)  # NaN stays


cdef inline vec mish_slope(vec z) noexcept nogil:
    """(n (n + 2) + 4 z e (e + 1))/(n + 2)^2 = e (4 (1 + z) + (6 + 4 z) e + 4 e^2 + e^3)/(n + 2)^2."""
    cdef vec c, e, d, p
    e = exp_mish(z, &c) / unity(z)
    d = fma(e, e, step(e, all_of(2, e), 2))
    p = fma(fma(e + all_of(4, e), e, step(c, all_of(4, e), 6)), e, times(4, c + all_of(1, e)))
    return where_at_most(z, z, e * p / (d * d), z)


# The others are made of the same exponential, or of none.


cdef inline vec sigmoid(vec z) noexcept nogil:
    cdef vec a, e
    e = exp_silu(z, &a)
    return unfold(z, e / (unity(z) + e))


cdef inline vec sigmoid_slope(vec z) noexcept nogil:
    cdef vec a, e
    e = exp_silu(z, &a)
    return e * (unity(z) / ((unity(z) + e) * (unity(z) + e)))


cdef inline vec tanh(vec z) noexcept nogil:
    """(1 - e)/(1 + e), e = exp(-2a), with 1 - e from the parts of e: it cancels nowhere."""
    cdef vec a = least(all_of(10 if vec is floats else 20, z), absolute(z)), t, g, less
    g = exp_parts(a + a, all_of(0, z), &t)
    less = (unity(z) - t) - g * t
    a = less / (times(2, unity(z)) - less)
    return where_at_most(absolute(z), all_of(0, z), z, where_at_most(z, all_of(0, z), -a, a))  # -0 stays


cdef inline vec tanh_slope(vec z) noexcept nogil:
    return times(4, sigmoid_slope(z + z))


cdef inline vec hardswish(vec z) noexcept nogil:
    """z min(max(z + 3, 0), 6) / 6, 0 at -inf."""
    cdef vec c = most(all_of(-3, z), z)  # NaN stays
    return c * times(1.0 / 6, least(all_of(6, z), c + all_of(3, z)))


cdef inline vec hardswish_slope(vec z) noexcept nogil:
    """That above -3."""
    return where_at_most(all_of(3, z), z, all_of(1, z), step(most(all_of(-3, z), z), all_of(1.0 / 3, z), 0.5))


cdef inline vec activated(int kind, vec z, vec leak) noexcept nogil:
    """act(z), for a kind known to the compiler."""
    if kind == RELU:
        return relu(z)
    elif kind == LEAKY_RELU:
        return where_at_most(z, all_of(0, z), leak * z, z)
    elif kind == SILU:
        return silu(z)
    elif kind == GELU:
        return gelu(z)
    elif kind == GELU_TANH:
        return gelu_tanh(z)
    elif kind == MISH:
        return mish(z)
    elif kind == HARDSWISH:
        return hardswish(z)
    elif kind == SIGMOID:
        return sigmoid(z)
    elif kind == TANH:
        return tanh(z)
    return z


cdef inline vec dy_before(int kind, vec z, vec dy, vec leak) noexcept nogil:
    """dy * act'(z), for a kind known to the compiler. At the kinks and where z is NaN it is PyTorch's."""
    cdef vec zero = all_of(0, z)
    if kind == RELU:
        return where_at_most(z, zero, zero, dy)
    elif kind == LEAKY_RELU:
        return where_at_most(most(z, zero), zero, leak * dy, dy)
    elif kind == SILU:
        return dy * silu_slope(z)
    elif kind == GELU:
        return dy * gelu_slope(z)
    elif kind == GELU_TANH:
        return dy * gelu_tanh_slope(z)
    elif kind == MISH:
        return dy * mish_slope(z)
    elif kind == HARDSWISH:
        return where_at_most(z, all_of(-3, z), zero, dy * hardswish_slope(z))
    elif kind == SIGMOID:
        return dy * sigmoid_slope(z)
    elif kind == TANH:
        return dy * tanh_slope(z)
    return dy

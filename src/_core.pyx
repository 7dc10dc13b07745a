# cython: boundscheck=True, wraparound=True
"""The entry points: what users call. Arguments are checked (arguments.pxi) and seen as a kernel sees them (layout.pxi),
the work is laid out (plan.pxi) and shared among threads (threads.pxi). No arithmetic lives here: that is kernel/.
"""

import numpy as np

from gn_fast.gradient_sums import GradientSums
from gn_fast.moments import Moments

cimport numpy as cnp
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport NAN
from libc.stdint cimport int64_t

from job cimport *

cnp.import_array()

include "isa.pxi"
include "threads.pxi"
include "pool.pxi"
include "arguments.pxi"
include "layout.pxi"
include "plan.pxi"
include "tensors.pxi"


def _config():
    return {
        "isa": {"used": _isa, "available": list(isa_levels())},
        "threads": {"used": get_num_threads(), "openmp": GN_OPENMP or None, "processors": _processors()},
        "caches": {"level 2": L2_BYTES, "last level": LAST_LEVEL_BYTES},
        "pool": {"limit": gn_pool_limit, "kept": gn_pool_kept()},
    }


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, *, axis=1, residual=None, activation=None,
               mask=None, moments=None, out=None, return_moments=False, num_threads=None):
    """Group normalization: each sample's groups of channels brought to mean 0 and variance 1, then weighted.

    For sample n and group g, over the D = C/G * prod(spatial) values of that slab::

        mean = sum(x) / D       var = sum((x - mean)^2) / D       rstd = 1 / sqrt(var + eps)
        y = activation((x - mean) * rstd * weight[c] + bias[c] + residual)

    Parameters
    ----------
    x : array_like, shape (N, C, spatial...), or with the channels at `axis`
        float16, bfloat16 (of ``ml_dtypes``), float32 or float64; integers and bools are taken as float64. Any
        strides: neither channels-last nor strided nor broadcast arrays are copied, nor objects of other libraries that
        speak DLPack, if they are in the CPU's memory.
    num_groups : int
        G, the number of groups (not their size); it must divide C. 1 is layer normalization over all but the
        samples, C is instance normalization.
    weight, bias : array_like, a scalar or of shape (C,), (1, C) or (N, C), optional
        Scale and shift, each of any float dtype: of all channels, of each, or of each in each sample (AdaGN, FiLM).
        A one for each of the spatial axes may follow, as in ``(C, 1, 1)`` or ``(N, C, 1, 1)``, wherever x has its
        channels.
    eps : float
        Added to the variance inside the root; at least 0.
    axis : int
        Which axis has the channels: any but the first. ``-1`` for channels-last.
    residual : array_like, x's shape, optional
        Added after the affine and before the activation.
    activation : None, str or tuple ("leaky_relu", slope)
        "relu", "leaky_relu", "silu" (or "swish"), "gelu" (the exact one, by erf), "gelu_tanh", "mish", "hardswish",
        "sigmoid" or "tanh". The slope of "leaky_relu" for negative values is 0.01, or any finite number, and rounded to
        the type that is computed in. Within 4 ulp of exact in float32.
    mask : array_like of bool, optional
        Broadcastable to x with one channel. False positions (padding) do not count in the statistics; they are
        normalized like the others.
    moments : Moments, shape (N, G), optional
        Use these statistics instead of x's own.
    out : ndarray, x's shape and dtype, optional
        Where to write. It may be x itself; where it overlaps an input otherwise, that is copied first.
    return_moments : bool
        Also return the statistics that were used.
    num_threads : int, optional
        At most so many threads in this call; by default what :func:`get_num_threads` says.

    Returns
    -------
    y : ndarray
        `out`, or a new array of x's shape, dtype (float64 for integers) and order of memory, as a ufunc gives it: axes
        along which x is broadcast do not decide. If x is of a subclass of ndarray, what its ``__array_wrap__`` makes of
        that.
    moments : Moments
        Only with ``return_moments=True``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it; `out` is then as it was.
    MemoryError
        If there is no memory for the result.

    See Also
    --------
    group_norm_backward : its gradient.
    group_moments : its statistics.

    Notes
    -----
    The moments are found in one pass: blocks of values are summed about a pivot near their mean in float32
    (float64 for float64) and merged in float64 by the update of Chan, Golub and LeVeque (1983) [2]_. The mean is
    subtracted before anything is multiplied. float32 results are within 2 ulp of exact for a mean of up to 1e6
    standard deviations, and the same to the last bit for any number of threads, batch and strides, and any instruction
    set with fused multiply-add.

    References
    ----------
    .. [1] Yuxin Wu and Kaiming He, "Group Normalization", 2018, arXiv:1803.08494, equations 1, 2 and 7.
    .. [2] Tony F. Chan, Gene H. Golub and Randall J. LeVeque, "Algorithms for computing the sample variance: analysis
       and recommendations", The American Statistician 37, 1983, equation 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> import gn_fast
    >>> x = np.random.default_rng(0).random((2, 8, 4, 4), dtype=np.float32)
    >>> y = gn_fast.group_norm(x, 2)
    >>> slabs = y.reshape(2, 2, -1)
    >>> bool(abs(slabs.mean(-1)).max() < 1e-6), bool(abs(slabs.std(-1) - 1).max() < 1e-3)
    (True, True)

    Channels-last, with a weight, and the SiLU fused in:

    >>> y = gn_fast.group_norm(x.transpose(0, 2, 3, 1), 2, np.full(8, 2.0), axis=-1, activation="silu")
    >>> y.shape
    (2, 4, 4, 8)
    """
    cdef Call call
    cdef Job *job = &call.job
    cdef cnp.ndarray a = open_call(&call, x, num_groups, axis), y = None
    if out is not None:
        check_out(out, a)
    w, b, alive, num_threads, statistics = read_options(  # arrays named here stay alive until the end
        &call, a, weight, bias, eps, residual, activation, mask, moments, out, num_threads)
    if statistics is None:
        add_pass(&call, &call.plan.kernel.moments)
        if return_moments:
            statistics = empty_moments(job)
            use_moments(job, statistics)
    if out is not None:
        if cnp.PyArray_ISBEHAVED(out):
            y = out
        if not same_places(a, out):
            a = apart(a, out)
            view(&job.x, a, call.axis)
    if y is None:
        y = fresh_like(a)
    see_output(job, &job.y, y, call.axis)
    add_pass(&call, &call.plan.kernel.affine)
    parameters = settle_types(&call)
    run(&call.plan, num_threads)
    result = finished(x, y, out)
    return (result, moments or statistics) if return_moments else result


def group_moments(x, num_groups, *, axis=1, mask=None, num_threads=None):
    """The statistics of each sample's groups: count, mean and sum of squared deviations.

    Parameters
    ----------
    x, num_groups, axis, mask, num_threads
        As for :func:`group_norm`.

    Returns
    -------
    Moments
        Of shape (N, G). A group with nothing to count has count, mean and m2 0; NaN or infinity in x makes the mean
        and m2 of its group NaN or infinite. Those of parts can be merged into those of the whole.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it.

    Notes
    -----
    One pass over x, merging blocks by the update of Chan, Golub and LeVeque (1983), "Algorithms for computing the
    sample variance", The American Statistician 37, equation 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> import gn_fast
    >>> m = gn_fast.group_moments(np.arange(8.0).reshape(1, 2, 4), 2)
    >>> m.mean
    array([[1.5, 5.5]])
    >>> m.var
    array([[1.25, 1.25]])
    """
    cdef Call call
    cdef cnp.ndarray a = open_call(&call, x, num_groups, axis)
    w, b, alive, num_threads, _ = read_options(&call, a, None, None, 0.0, None, None, mask, None, None, num_threads)
    statistics = empty_moments(&call.job)
    use_moments(&call.job, statistics)
    add_pass(&call, &call.plan.kernel.moments)
    call.job.work = call.job.x.storage
    run(&call.plan, num_threads)
    return statistics


def group_norm_backward(dy, x, num_groups, weight=None, bias=None, eps=1e-5, *, axis=1, residual=None,
                        activation=None, mask=None, moments=None, sums=None, out=None, num_threads=None):
    """The gradient of :func:`group_norm`: of sum(dy * y) with respect to x, weight, bias and residual.

    With xhat = (x - mean) * rstd, dy' = dy * activation'(xhat * weight + bias + residual), and a and b the means
    of weight * dy' and weight * dy' * xhat over a slab::

        dbias = sum(dy')     dweight = sum(dy' * xhat)     dx = rstd * (weight * dy' - a - xhat * b)

    Parameters
    ----------
    dy : array_like, x's shape
        The gradient with respect to y; any float dtype, any order of memory.
    x, num_groups, weight, bias, eps, axis, residual, activation, mask
        As for :func:`group_norm`, with the values of the forward call.
    moments : Moments, shape (N, G), optional
        x's statistics as the forward call returned them; without them they are computed again, in one more sweep.
    sums : GradientSums, shape (N, C), optional
        Use these sums over the slabs instead of those of x and dy: for a tile of a whole, the moments' own, those of
        all tiles, as :func:`group_gradient_sums` found and ``merge`` added them. Only together with `moments`. With
        ``GradientSums.zeros(N, C)`` the moments count as constants: dx = rstd * weight * dy'.
    out : ndarray, x's shape and dtype, optional
        Where to write dx. It may be dy or x itself; where it overlaps an input otherwise, that is copied first.
    num_threads : int, optional
        As for :func:`group_norm`.

    Returns
    -------
    dx : ndarray
        `out`, or a new array of x's shape, dtype and order of memory.
    dweight, dbias : ndarray or None
        Of weight's and bias's shape and dtype, summed in float64 in a fixed order; None where they are absent. For a
        scalar an array of no dimensions, the sum over all channels. With `sums` they are those of the sums, the
        whole's, whichever tile is asked: zeros for ``GradientSums.zeros``.
    dresidual : ndarray
        Only if `residual` is given: dy' in x's dtype.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it; `out` is then as it was.
    MemoryError
        If there is no memory for the results.

    Notes
    -----
    The sums are those of dy' and dy' * (x - mean), centred: sum(dy' * x) would lose the digits that the mean and
    x have in common. Masked positions receive gradient through their own y, but none through the statistics, in
    which they did not count. One whose dy' is 0 contributes nothing and its dx is 0, whatever x and residual hold
    there, NaN too.

    a and b are divided by the count of the moments. So a tile with the moments of its whole, but without `sums`, gets
    the gradient of what its own outputs contribute; with the sums of the whole, that of all.

    Wu and He, "Group Normalization", 2018, arXiv:1803.08494; the derivation is that of Ioffe and Szegedy, "Batch
    Normalization", 2015, arXiv:1502.03167, section 3, over a slab.

    Examples
    --------
    >>> import numpy as np
    >>> import gn_fast
    >>> rng = np.random.default_rng(0)
    >>> x, dy = rng.standard_normal((2, 2, 4, 3))
    >>> dx, dweight, dbias = gn_fast.group_norm_backward(dy, x, 2, weight=np.ones(4))
    >>> dx.shape, dweight.shape, dbias
    ((2, 4, 3), (4,), None)

    With statistics that count as constants, dweight and dbias are those of the samples' own sums:

    >>> m, w = gn_fast.group_moments(x, 2), np.ones(4)
    >>> constants = gn_fast.GradientSums.zeros(2, 4)
    >>> dx, _, _ = gn_fast.group_norm_backward(dy, x, 2, w, moments=m, sums=constants)
    >>> np.allclose(dx, dy * np.repeat(m.rstd(), 2, axis=1)[:, :, None], rtol=1e-14)
    True
    >>> dweight = gn_fast.group_gradient_sums(dy, x, 2, w, moments=m).dweight.sum(0)
    """
    cdef Call call
    cdef Job *job = &call.job
    cdef cnp.ndarray a = open_call(&call, x, num_groups, axis), g, dx = None, dresidual, w, b
    if out is not None:
        check_out(out, a)
        if not same_places(a, out):
            a = apart(a, out)
            view(&job.x, a, call.axis)
    g = like_x(&job.dy, dy, "dy", a, call.axis, out)
    w, b, alive, num_threads, statistics = read_options(
        &call, a, weight, bias, eps, residual, activation, mask, moments, out, num_threads)
    if sums is not None:
        sums = checked_sums(job, sums, statistics)
    if statistics is None:
        add_pass(&call, &call.plan.kernel.moments)
    # A result that is yet to be wrapped as x's own type may still fail: out is then written last.
    if out is not None and cnp.PyArray_ISBEHAVED(out) and (residual is None or not has_own_type(x)):
        dx = out
    else:
        dx = fresh_like(a)
    see_output(job, &job.y, dx, call.axis)
    if residual is not None:
        dresidual = fresh_like(a)
        see_output(job, &job.dresidual, dresidual, call.axis)
    each = has_rows(&job.weight) or has_rows(&job.bias)
    dweight, dbias = find_sums(&call, 1 if each else samples_together(job)) if sums is None else take_sums(&call, sums)
    add_pass(&call, &call.plan.kernel.gradient)
    parameters = settle_types(&call)
    run(&call.plan, num_threads)
    dweight, dbias = summed(dweight, w, &job.weight, job), summed(dbias, b, &job.bias, job)
    if residual is None:
        return finished(x, dx, out), dweight, dbias
    wrapped = finished(x, dresidual, None)
    return finished(x, dx, out), dweight, dbias, wrapped


def group_gradient_sums(dy, x, num_groups, weight=None, bias=None, eps=1e-5, *, axis=1, residual=None,
                        activation=None, mask=None, moments=None, num_threads=None):
    """The sums over whole slabs that :func:`group_norm_backward` needs: those of tiles add up to those of their whole.

    With xhat = (x - mean) * rstd and dy' = dy * activation'(xhat * weight + bias + residual), over the positions of
    each channel of each sample::

        dweight = sum(dy' * xhat)     dbias = sum(dy')

    Parameters
    ----------
    dy, x, num_groups, weight, bias, eps, axis, residual, activation, mask
        As for :func:`group_norm_backward`.
    moments : Moments, shape (N, G), optional
        The statistics: for a tile those of the whole, as :func:`group_moments` found and ``merge`` merged them.
        Without them they are x's own.
    num_threads : int, optional
        As for :func:`group_norm`.

    Returns
    -------
    GradientSums
        Of shape (N, C), float64. Those of parts can be merged into those of the whole; summed over the samples they
        are the gradients with respect to a weight and a bias of shape (C,).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it.
    MemoryError
        If there is no memory for the sums.

    See Also
    --------
    group_norm_backward : which takes them as ``sums=``.

    Notes
    -----
    One sweep over x and dy, the first of :func:`group_norm_backward`, in the same order: the same bits for any number
    of threads and any batch. Each sum is within 1e-6 of the largest. Wu and He, "Group Normalization", 2018,
    arXiv:1803.08494; the derivation is that of Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167,
    section 3, over a slab.

    Examples
    --------
    A volume in four tiles, each of which could be on another machine, and the whole at once:

    >>> import numpy as np
    >>> import gn_fast
    >>> rng = np.random.default_rng(0)
    >>> x, dy = rng.standard_normal((2, 1, 8, 4, 20, 6))
    >>> weight, bias = rng.standard_normal((2, 8))
    >>> tiles = [np.s_[:, :, :, i : i + 5] for i in range(0, 20, 5)]
    >>> own = [gn_fast.group_moments(x[t], 2) for t in tiles]
    >>> m = own[0].merge(*own[1:])
    >>> y = np.concatenate([gn_fast.group_norm(x[t], 2, weight, bias, moments=m) for t in tiles], axis=3)
    >>> own = [gn_fast.group_gradient_sums(dy[t], x[t], 2, weight, bias, moments=m) for t in tiles]
    >>> s = own[0].merge(*own[1:])
    >>> each = [gn_fast.group_norm_backward(dy[t], x[t], 2, weight, bias, moments=m, sums=s) for t in tiles]
    >>> dx = np.concatenate([gradients[0] for gradients in each], axis=3)
    >>> _, dweight, dbias = each[0]  # any tile's: they are the whole's
    >>> whole = gn_fast.group_norm(x, 2, weight, bias), *gn_fast.group_norm_backward(dy, x, 2, weight, bias)
    >>> [np.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip((y, dx, dweight, dbias), whole)]
    [True, True, True, True]
    """
    cdef Call call
    cdef Job *job = &call.job
    cdef cnp.ndarray a = open_call(&call, x, num_groups, axis), g = like_x(&job.dy, dy, "dy", a, call.axis, None)
    w, b, alive, num_threads, statistics = read_options(
        &call, a, weight, bias, eps, residual, activation, mask, moments, None, num_threads)
    if statistics is None:
        add_pass(&call, &call.plan.kernel.moments)
    dweight, dbias = find_sums(&call, 1)
    job.y = job.x  # nothing is written, but tiles are as long as those of dx
    parameters = settle_types(&call)
    run(&call.plan, num_threads)
    return GradientSums._trusted(dweight, dbias) if job.N * job.C else GradientSums.zeros(job.N, job.C)


cdef Py_ssize_t samples_together(const Job *job):
    """The samples of a block, by shape only: up to 64 blocks that are worth a share of a thread."""
    return max(1, (job.N + 63) // 64, min(job.N, WORTH_A_THREAD // 4 // max(1, job.C * job.S)))


cdef finished(x, cnp.ndarray y, out):
    """The result as the caller asked for it: in `out`, or of x's own array type."""
    if out is not None:
        if out is not y:
            cnp.PyArray_CopyInto(out, y)
        return out
    return x.__array_wrap__(y, None, False) if has_own_type(x) else y


cdef inline bint has_own_type(x) noexcept:
    return cnp.PyArray_Check(x) and not cnp.PyArray_CheckExact(x)


cdef summed(cnp.ndarray sums, cnp.ndarray value, const View *v, Job *job):
    """A weight's or bias's gradient from its sums over blocks of samples, which are added up in order, as those of the channels are
    for a scalar."""
    cdef double *total = <double *> cnp.PyArray_DATA(sums)
    cdef float *rounded
    cdef cnp.ndarray result, single
    cdef Py_ssize_t n, c, size
    if value is None:
        return None
    result = PyArray_NewLikeArray(value, cnp.NPY_CORDER, NULL, 0)
    size = cnp.PyArray_SIZE(result)
    if not has_rows(v):
        for n in range(1, cnp.PyArray_DIM(sums, 0)):
            for c in range(job.C):
                total[c] += total[n * job.C + c]
    if cnp.PyArray_NDIM(value) == 0:
        for c in range(1, job.C):
            total[0] += total[c]
    for c in range(size):
        total[c] = total[c] if total[c] == total[c] else NAN  # always this one: compilers choose the sign of NaN + NaN
    if storage_of(result) == FLOAT32 or storage_of(result) == BFLOAT16:
        single = result if storage_of(result) == FLOAT32 else empty_row(size, cnp.NPY_FLOAT)
        rounded = <float *> cnp.PyArray_DATA(single)
        for c in range(size):
            rounded[c] = <float> total[c]
        if single is not result:  # from float32 no flag is raised, so that no errstate is needed, which takes 1 us
            (<object> result).reshape(-1)[...] = single
    else:
        with np.errstate(all="ignore"):  # beyond the largest float16 is infinity, as it is in dx
            (<object> result)[...] = (<object> sums).reshape(-1)[:size].reshape(shape_of(result))
    return result

"""Group normalization in plain float64 NumPy: the readable specification and the tests' oracle.

Speed, threads and the full checking of arguments live elsewhere. Everything is computed in
float64 and rounded once, to the dtype of the result; `x.astype(np.float64)` gives the result
before that rounding.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .gradient_sums import GradientSums
from .moments import Moments

__all__ = [
    "GradientSums",
    "Moments",
    "group_gradient_sums",
    "group_moments",
    "group_norm",
    "group_norm_backward",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Activation = str | tuple[str, SupportsFloat] | None


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    num_threads: int | None = None,
) -> Any:
    """Normalize each group of channels of each sample to mean 0 and variance 1.

    For the slab of values that share the sample n and the group g of C / num_groups channels::

        xhat = (x - mean) / sqrt(var + eps)
        y    = activation(xhat * weight + bias + residual)

    Parameters
    ----------
    x : array_like, shape (N, C, *spatial)
        At least 2-D; float16, bfloat16, float32 or float64. Integers and bools become float64.
    num_groups : int
        Number of groups; it divides C.
    weight, bias : array_like, a scalar or of shape (C,), (1, C) or (N, C), optional
        Scale and shift of each channel, 1 and 0 by default. A one for each spatial axis may follow,
        as in (C, 1, 1) or (N, C, 1, 1).
    eps : float
        Added to the variance inside the root.
    axis : int
        Where `x` has its channels: any axis but 0.
    residual : array_like, shape of x, optional
        Added before the activation.
    activation : None, str or tuple ("leaky_relu", slope)
        The last step: "relu", "leaky_relu", "silu" (or "swish"), "gelu" (the exact one),
        "gelu_tanh" (its approximation by tanh), "mish", "hardswish", "sigmoid" or "tanh". The
        slope of "leaky_relu" for negative values is 0.01 by default.
    mask : array_like of bool, optional
        Broadcasts to `x`, with 1 channel. Where it is False, `x` does not count in the
        statistics; it is normalized all the same.
    moments : Moments, optional
        Statistics to use in place of those of `x`.
    out : ndarray, optional
        Takes the result; may be `x`.
    return_moments : bool
        Return the statistics too.
    num_threads : int, optional
        Accepted and ignored.

    Returns
    -------
    y : ndarray
        Shape, dtype and memory order of `x`, or `out`.
    moments : Moments
        Only with `return_moments`.

    Raises
    ------
    TypeError
        If a dtype is not one of those above.
    ValueError
        If a shape does not fit, or `axis` or `activation` is none of those above.

    Notes
    -----
    Wu and He, "Group Normalization", 2018, arXiv:1803.08494: equations 1 and 2 normalize, 7 says
    which values make a group, 6 is the affine step.

    A NaN or an infinity makes NaN of its own slab only. With eps=0 so does a constant slab.

    Examples
    --------
    >>> x = [[1.0, 3.0, 10.0, 30.0]]
    >>> group_norm(x, num_groups=2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    >>> group_norm(x, num_groups=2, eps=0.0, bias=[0.0, 0.0, 5.0, 5.0], activation="relu")
    array([[0., 1., 4., 6.]])
    """
    x = np.asarray(x)
    dtype = _result_dtype("x", x)
    act = _activation(activation)
    with np.errstate(all="ignore"):
        values = _channels_first("x", x, x.shape, axis)
        keep = _counted(mask, x.shape, axis)
        moments = _statistics(values, num_groups, keep, moments)
        xhat = (values - _spread(moments.mean, values)) * _spread(moments.rstd(eps), values)
        z = _affine(xhat, weight, bias)
        if residual is not None:
            z = z + _channels_first("residual", residual, x.shape, axis)
        y, _ = act(z)
        y = _store(y, x, dtype, axis, out)
    return (y, moments) if return_moments else y


def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    sums: GradientSums | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array | None, ...]:
    """Gradients of a loss with respect to the arguments of `group_norm`.

    Parameters
    ----------
    dy : array_like, shape of x
        The gradient with respect to `group_norm`'s result.
    x, num_groups, weight, bias, eps, axis, residual, activation, mask, num_threads
        The arguments of the forward call.
    moments : Moments, optional
        The forward's statistics, to save computing them again. The gradient still flows through
        them: each counted value of `x` is taken for one of the `moments.count` that made them. So
        for a tile of a larger whole this is the exact gradient of what the tile's own outputs
        contribute. Where `moments.count` is 0 they are constants.
    sums : GradientSums, optional
        What `group_gradient_sums` gives, of the whole that the `moments` belong to, in place of
        the sums of `x` and `dy`: then dx is the exact gradient of the whole, and dweight and dbias
        are those of the whole. With `GradientSums.zeros` the moments are constants, and dweight
        and dbias are 0. Only together with `moments`.
    out : ndarray, optional
        Takes dx; may be `dy`.

    Returns
    -------
    dx : ndarray
        Shape, dtype and memory order of `x`, or `out`.
    dweight, dbias : ndarray or None
        Shape and dtype of `weight` and `bias`, 0-d for a scalar; None for one that is absent.
    dresidual : ndarray
        Like dx; only when `residual` is given.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`; if `dy` does not have the shape of `x`; and if `sums` does not fit or
        comes without `moments`.

    Notes
    -----
    With z the argument of the activation, and sums over the whole slab::

        dz    = dy * activation'(z)          dresidual = dz
        dbias = sum(dz)                      dweight   = sum(dz * xhat)
        dxhat = dz * weight

    A value of x moves its own xhat by rstd, and through the statistics every xhat of the slab:
    the mean by 1 / count, the variance by 2 (x - mean) / count. As d xhat / d mean = -rstd and
    d xhat / d var = -xhat rstd^2 / 2 (the variance does not change with the mean to first order)::

        a  = sum(dxhat) / count              b = sum(dxhat * xhat) / count
        dx = rstd * (dxhat - a - xhat * b)

    A value that the mask leaves out moves no statistics, so its a and b terms vanish; but its
    output depends on them, so its own dxhat is in both sums. If its dz is 0 it is in none, not
    even as 0 * NaN: whatever `x` and `residual` hold there, its dx is 0.

    The paper (arXiv:1803.08494) leaves the gradient to automatic differentiation; these are the
    formulas of Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3, over
    a group's slab.

    Examples
    --------
    >>> dx, dweight, dbias = group_norm_backward(
    ...     [[1.0, 0.0]], [[1.0, 3.0]], num_groups=1, weight=[1.0, 1.0], eps=3.0)
    >>> dx
    array([[ 0.1875, -0.1875]])
    >>> dweight
    array([-0.5,  0. ])
    >>> dbias is None
    True
    """
    x = np.asarray(x)
    dtype = _result_dtype("x", x)
    with np.errstate(all="ignore"):
        values = _channels_first("x", x, x.shape, axis)
        dy = _channels_first("dy", dy, x.shape, axis)
        added = None if residual is None else _channels_first("residual", residual, x.shape, axis)
        keep = _counted(mask, x.shape, axis)
        whole = _statistics(values, num_groups, keep, moments)
        dz, xhat = _dz_and_xhat(dy, values, whole, keep, weight, bias, eps, added, activation)
        sums = _sums(dz, xhat) if sums is None else _checked_sums(sums, values, moments)

        rstd = _spread(whole.rstd(eps), values)
        dxhat = _affine(dz, weight, None)
        count = np.maximum(whole.count, 1)
        each = 1.0 if weight is None else _rows("weight", weight, values)
        a = _slabs(each * sums.dbias, num_groups).sum(axis=-1) / count
        b = _slabs(each * sums.dweight, num_groups).sum(axis=-1) / count
        through_statistics = _spread(a, values) + xhat * _spread(b, values)
        moves_statistics = keep & _spread(whole.count > 0, values)
        dx = rstd * (dxhat - np.where(moves_statistics, through_statistics, 0.0))

        gradients = (
            _store(dx, x, dtype, axis, out),
            _gradient_of("weight", weight, sums.dweight, values),
            _gradient_of("bias", bias, sums.dbias, values),
        )
        return gradients if residual is None else (*gradients, _store(dz, x, dtype, axis, None))


def group_gradient_sums(
    dy: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    num_threads: int | None = None,
) -> GradientSums:
    """Sums that `group_norm_backward` needs of a whole, of each channel of each sample.

    Parameters
    ----------
    dy, x, num_groups, weight, bias, eps, axis, residual, activation, mask, moments, num_threads
        As in `group_norm_backward`.

    Returns
    -------
    GradientSums
        sum(dz * xhat) and sum(dz) over the positions of a channel.

    Raises
    ------
    TypeError, ValueError
        As `group_norm_backward`.

    Notes
    -----
    See `group_norm_backward`, whose sums a and b are sum(weight * dbias) and sum(weight * dweight)
    over the channels of a group.

    Examples
    --------
    >>> s = group_gradient_sums([[1.0, 0.0]], [[1.0, 3.0]], num_groups=1, eps=3.0)
    >>> s.dweight
    array([[-0.5,  0. ]])
    >>> s.dbias
    array([[1., 0.]])
    """
    x = np.asarray(x)
    with np.errstate(all="ignore"):
        values = _channels_first("x", x, x.shape, axis)
        dy = _channels_first("dy", dy, x.shape, axis)
        added = None if residual is None else _channels_first("residual", residual, x.shape, axis)
        keep = _counted(mask, x.shape, axis)
        moments = _statistics(values, num_groups, keep, moments)
        return _sums(*_dz_and_xhat(dy, values, moments, keep, weight, bias, eps, added, activation))


def group_moments(
    x: ArrayLike,
    num_groups: int,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    num_threads: int | None = None,
) -> Moments:
    """Count, mean and sum of squared deviations of each group of channels of each sample.

    Parameters
    ----------
    x, num_groups, axis, mask, num_threads
        As in `group_norm`.

    Returns
    -------
    Moments
        Arrays of shape (N, num_groups); count, mean and m2 are 0 where nothing counts, mean and
        m2 are NaN where a NaN or an infinity counts.

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Notes
    -----
    The corrected two-pass algorithm of Chan, Golub and LeVeque, "Algorithms for Computing the
    Sample Variance: Analysis and Recommendations", The American Statistician 37 (1983).

    Examples
    --------
    >>> m = group_moments([[1.0, 3.0, 10.0, 30.0]], num_groups=2)
    >>> m.mean
    array([[ 2., 20.]])
    >>> m.var
    array([[  1., 100.]])
    """
    x = np.asarray(x)
    _result_dtype("x", x)
    with np.errstate(all="ignore"):
        values = _channels_first("x", x, x.shape, axis)
        return _statistics(values, num_groups, _counted(mask, x.shape, axis), None)


# ---- the statistics ------------------------------------------------------------------------------


def _statistics(
    values: Float64, num_groups: int, keep: NDArray[np.bool_], given: Moments | None
) -> Moments:
    n, c = values.shape[:2]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups must divide the {c} channels of x, got {num_groups}")
    if given is not None:
        if given.count.shape != (n, num_groups):
            raise ValueError(
                f"moments must have the shape {(n, num_groups)}, got {given.count.shape}"
            )
        return given
    slabs, keep = _slabs(values, num_groups), _slabs(keep, num_groups)

    def total(of: Float64) -> Float64:
        # Chosen and not multiplied: a NaN in the padding must not count either.
        return np.asarray(np.where(keep, of, 0.0).sum(axis=-1, keepdims=True))

    count = keep.sum(axis=-1, keepdims=True, dtype=np.int64)
    d = np.maximum(count, 1)
    mean = total(slabs / d)  # divided first: the sum can overflow where the mean does not
    mean = mean + total((slabs - mean) / d)
    rest = total((slabs - mean) / d)  # what rounding the mean left out, up to half an ulp of it
    m2 = total((slabs - mean - rest) ** 2)
    return Moments(count[..., 0], mean[..., 0], m2[..., 0])


# ---- what both sweeps of the gradient begin with -------------------------------------------------


def _dz_and_xhat(
    dy: Float64,
    values: Float64,
    moments: Moments,
    keep: NDArray[np.bool_],
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    residual: Float64 | None,
    activation: Activation,
) -> tuple[Float64, Float64]:
    """What the gradient is made of: where a position is masked out and passes nothing on, both are 0."""
    act = _activation(activation)
    xhat = (values - _spread(moments.mean, values)) * _spread(moments.rstd(eps), values)
    z = _affine(xhat, weight, bias)
    if residual is not None:
        z = z + residual
    z = np.where(~keep & (dy == 0), 0.0, z)
    _, slope = act(z)
    # In PyTorch these slopes are switches: closed, they stop a NaN of dy too.
    closed = {"relu": z <= 0, "hardswish": z <= -3}.get(str(activation), False)
    dz = np.where(closed, 0.0, dy * slope)
    return dz, np.where(~keep & (dz == 0), 0.0, xhat)


def _sums(dz: Float64, xhat: Float64) -> GradientSums:
    n, c, *spatial = dz.shape
    rows = n, c, math.prod(spatial)
    return GradientSums((dz * xhat).reshape(rows).sum(axis=-1), dz.reshape(rows).sum(axis=-1))


def _checked_sums(sums: GradientSums, values: Float64, moments: Moments | None) -> GradientSums:
    if moments is None:
        raise ValueError("moments must be given with sums: those that they were taken with")
    if sums.dbias.shape != values.shape[:2]:
        raise ValueError(f"sums must have the shape {values.shape[:2]}, got {sums.dbias.shape}")
    return sums


# ---- the activations: value and derivative -------------------------------------------------------
# Written with exponentials that can only underflow, and with no difference of nearly equal terms,
# so that both tails are right. At -inf they have their limit, not inf * 0 = NaN. Where a derivative
# jumps, and that of relu and leaky_relu at NaN, it is PyTorch's.


def _identity(z: Float64) -> tuple[Float64, Float64]:
    return z, np.ones_like(z)


def _relu(z: Float64) -> tuple[Float64, Float64]:
    return np.maximum(z, 0.0), np.where(z <= 0, 0.0, 1.0)


def _leaky_relu(z: Float64, slope: SupportsFloat = 0.01) -> tuple[Float64, Float64]:
    below = float(slope)
    return np.where(z > 0, z, below * z), np.where(z > 0, 1.0, below)


def _silu(z: Float64) -> tuple[Float64, Float64]:
    z = _finite_left(z)
    return z * _sigmoid(z), _sigmoid(z) * (1.0 + _finite(z) * _sigmoid(-z))


def _gelu(z: Float64) -> tuple[Float64, Float64]:
    z = _finite_left(z)
    cdf = 0.5 * _erfc(-z / math.sqrt(2.0))
    pdf = np.exp(-0.5 * _finite(z) ** 2) / math.sqrt(2.0 * math.pi)
    return z * cdf, cdf + _finite(z) * pdf


def _gelu_tanh(z: Float64) -> tuple[Float64, Float64]:
    # 1 + tanh(u) = 2 sigmoid(2u), which keeps its digits where tanh(u) is nearly -1.
    z, t = _finite_left(z), _finite(z)
    two_u = math.sqrt(8.0 / math.pi) * (t + 0.044715 * t**3)
    slope = math.sqrt(8.0 / math.pi) * (1.0 + 3 * 0.044715 * t**2)
    s = _sigmoid(two_u)
    return z * s, s * (1.0 + t * slope * _sigmoid(-two_u))


def _mish(z: Float64) -> tuple[Float64, Float64]:
    # tanh(log(1 + e^z)) = n / (n + 2), n = e^z (e^z + 2); for z > 0 both divided by e^2z.
    z = _finite_left(z)
    e = np.exp(-np.abs(z))
    n = np.where(z > 0, 1.0 + 2.0 * e, e * (e + 2.0))
    two = np.where(z > 0, 2.0 * e * e, 2.0)
    t = n / (n + two)
    one_minus_t = two / (n + two)
    return z * t, t + _finite(z) * _sigmoid(z) * one_minus_t * (1.0 + t)


def _hardswish(z: Float64) -> tuple[Float64, Float64]:
    z = np.maximum(z, -3.0)
    slope = np.where(z >= 3, 1.0, z / 3.0 + 0.5)
    return z * (np.minimum(z + 3.0, 6.0) / 6.0), np.where(z == -3, 0.0, slope)


def _logistic(z: Float64) -> tuple[Float64, Float64]:
    return _sigmoid(z), _sigmoid(z) * _sigmoid(-z)


def _tanh(z: Float64) -> tuple[Float64, Float64]:
    return np.tanh(z), 4.0 * _sigmoid(2.0 * z) * _sigmoid(-2.0 * z)


def _sigmoid(z: Float64) -> Float64:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def _finite_left(z: Float64) -> Float64:
    return np.maximum(z, -1000.0)  # exp(-1000) is 0 in float64: nothing changes but -inf


def _finite(z: Float64) -> Float64:
    return np.clip(z, -1000.0, 1000.0)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])

_ACTIVATIONS: dict[str | None, Callable[[Float64], tuple[Float64, Float64]]] = {
    None: _identity,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "mish": _mish,
    "hardswish": _hardswish,
    "sigmoid": _logistic,
    "tanh": _tanh,
}


def _activation(activation: Activation) -> Callable[[Float64], tuple[Float64, Float64]]:
    match activation:
        case tuple(("leaky_relu", slope)):
            return functools.partial(_leaky_relu, slope=slope)
        case None | str() if activation in _ACTIVATIONS:
            return _ACTIVATIONS[activation]
    raise ValueError(
        f"activation must be one of {list(_ACTIVATIONS)} or ('leaky_relu', slope), got {activation!r}"
    )


# ---- shapes: everything is worked on as (N, C, *spatial) -----------------------------------------


def _channels_first(name: str, values: ArrayLike, shape: tuple[int, ...], axis: int) -> Float64:
    values = np.asarray(values)
    _result_dtype(name, values)
    if values.shape != shape:
        raise ValueError(f"{name} must have the shape of x, {shape}, got {values.shape}")
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions, got {ndim}")
    if not -ndim <= axis < ndim or axis % ndim == 0:
        raise ValueError(f"axis must be any axis of x's {ndim} but the first, got {axis}")
    # In C order, because NumPy sums pairwise only along contiguous memory.
    return np.ascontiguousarray(np.moveaxis(values, axis, 1), dtype=np.float64)


def _counted(mask: ArrayLike | None, shape: tuple[int, ...], axis: int) -> NDArray[np.bool_]:
    keep = np.asarray(True if mask is None else mask)
    if keep.dtype != np.bool_:
        raise TypeError(f"mask must be of dtype bool, got {keep.dtype}")
    wanted = list(shape)
    wanted[axis] = 1
    try:
        keep = np.broadcast_to(keep, wanted)
    except ValueError:
        raise ValueError(
            f"mask must broadcast to x with one channel, {tuple(wanted)}, got {keep.shape}"
        ) from None
    return np.moveaxis(np.broadcast_to(keep, shape), axis, 1)


def _slabs(values: Array, num_groups: int) -> Array:
    n, c, *spatial = values.shape
    return values.reshape(n, num_groups, c // num_groups * math.prod(spatial))


def _spread(per_group: Array, values: Float64) -> Array:
    n, c = values.shape[:2]
    per_channel = np.repeat(per_group, c // per_group.shape[1], axis=1)
    return per_channel.reshape(n, c, *(1,) * (values.ndim - 2))


def _affine(values: Float64, weight: ArrayLike | None, bias: ArrayLike | None) -> Float64:
    if weight is not None:
        values = values * _per_channel("weight", weight, values)
    if bias is not None:
        values = values + _per_channel("bias", bias, values)
    return values


def _per_channel(name: str, parameter: ArrayLike, values: Float64) -> Float64:
    rows = _rows(name, parameter, values)
    return rows.reshape(*rows.shape, *(1,) * (values.ndim - 2))


def _rows(name: str, parameter: ArrayLike, values: Float64) -> Float64:
    """A weight or bias as (N, C), with 1 for what samples or channels share."""
    parameter = np.asarray(parameter)
    _result_dtype(name, parameter)
    n, c, *spatial = values.shape
    ones = (1,) * len(spatial)
    rows: dict[tuple[int, ...], tuple[int, int]] = {(): (1, 1)}
    for shape in ((c,), (1, c), (n, c)):
        rows[shape] = rows[*shape, *ones] = (n if len(shape) == 2 and shape[0] == n else 1, c)
    if parameter.shape not in rows:
        raise ValueError(f"{name} must have one of the shapes {list(rows)}, got {parameter.shape}")
    return parameter.astype(np.float64).reshape(rows[parameter.shape])


def _gradient_of(
    name: str, parameter: ArrayLike | None, sums: Float64, values: Float64
) -> Array | None:
    if parameter is None:
        return None
    parameter = np.asarray(parameter)
    shared = tuple(d for d, size in enumerate(_rows(name, parameter, values).shape) if size == 1)
    total = sums.sum(axis=shared).reshape(parameter.shape)
    return _round(total, _result_dtype(name, parameter))


# ---- dtypes: the one rounding at the end ---------------------------------------------------------


def _result_dtype(name: str, array: Array) -> np.dtype[Any]:
    dtype = array.dtype.newbyteorder("=")
    if dtype.kind in "biu":
        return np.dtype(np.float64)
    if dtype in (np.float16, np.float32, np.float64) or dtype.name == "bfloat16":
        return dtype
    raise TypeError(
        f"{name} must be float16, bfloat16, float32, float64, integer or bool, got {array.dtype}"
    )


def _store(values: Float64, x: Array, dtype: np.dtype[Any], axis: int, out: Array | None) -> Array:
    if out is None:
        out = _empty_in_order_of(x, dtype)
    elif out.shape != x.shape:
        raise ValueError(f"out must have the shape of x, {x.shape}, got {out.shape}")
    elif out.dtype != dtype:
        raise TypeError(f"out must be of dtype {dtype}, got {out.dtype}")
    out[...] = np.moveaxis(_round(values, dtype), 1, axis)
    return out


def _empty_in_order_of(x: Array, dtype: np.dtype[Any]) -> Array:
    """Memory for what a ufunc makes of x: unlike np.empty_like, broadcast axes do not decide."""
    operands: list[Any] = [x, None]
    flags: list[list[Any]] = [["readonly"], ["writeonly", "allocate"]]
    return np.nditer(operands, ["zerosize_ok"], flags, [None, dtype]).operands[1]


def _round(values: Float64, dtype: DTypeLike) -> Array:
    dtype = np.dtype(dtype)
    if dtype.name == "bfloat16":
        # ml_dtypes casts by way of float32 and so rounds twice. Twice is once if the first
        # rounding is to odd: cut to float32 and set the last bit if anything was cut off.
        single = values.astype(np.float32)
        cut = single.view(np.uint32) - (np.abs(single) > np.abs(values)).astype(np.uint32)
        inexact = (single != values) & ~np.isnan(values)
        values = (cut | inexact.astype(np.uint32)).view(np.float32)
    return values.astype(dtype)

"""Tensors as the arrays that the kernel works on, and what it is asked to do to them. No autograd lives here."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, contiguous_format, get_num_threads
from torch._prims_common import suggest_memory_format

import gn_fast
from gn_fast._core import _Tensors, group_norm

Activation = str | tuple[str, float] | None

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
array_of = _Tensors(Tensor, np.dtype(ml_dtypes.bfloat16)).array  # the tensor's memory


def array(tensor: Tensor | None) -> Any:
    """The tensor's memory as an array."""
    return None if tensor is None else array_of(tensor)


def tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """An array that nobody else has as a tensor."""
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(dtype)
    return torch.from_numpy(array)


def copied(array: Any, like: Tensor) -> Tensor:
    """An array's values in memory of PyTorch's, of the shape and dtype of another tensor."""
    copy = torch.empty_like(like)
    array_of(copy)[...] = array
    return copy


def empty_like(input: Tensor) -> Tensor:
    """Where a result goes: of the strides that PyTorch's own group norm gives it."""
    if input.is_contiguous() and input.stride(1) != 1:  # and so not channels-last as well, which takes 1.6 us to find
        return torch.empty_like(input, memory_format=contiguous_format)
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def forward(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Any,
    residual: Tensor | None,
) -> Tensor:
    """The result; written out, as the calls of `array` took 5% of a small one's time."""
    y = empty_like(input)
    group_norm(
        array_of(input), num_groups, weight if weight is None else array_of(weight),
        bias if bias is None else array_of(bias), eps,
        residual=residual if residual is None else array_of(residual), activation=activation,
        out=array_of(y), num_threads=get_num_threads(),
    )  # fmt: skip
    return y


def forward_with_moments(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Any,
    residual: Tensor | None,
) -> tuple[Tensor, gn_fast.Moments]:
    """y, and the statistics, with which its gradient takes a sweep less."""
    y = empty_like(input)
    _, moments = group_norm(
        array(input), num_groups, array(weight), array(bias), eps, residual=array(residual),
        activation=activation, out=array(y), return_moments=True, num_threads=get_num_threads(),
    )  # fmt: skip
    return y, moments


def backward(
    dy: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Any,
    residual: Tensor | None,
    moments: gn_fast.Moments | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight, bias and residual; None for one that is absent."""
    dresidual: Any
    dx = empty_like(input)
    _, dweight, dbias, *dresidual = gn_fast.group_norm_backward(
        array(dy), array(input), num_groups, array(weight), array(bias), eps, residual=array(residual),
        activation=activation, moments=moments, out=array(dx), num_threads=get_num_threads(),
    )  # fmt: skip
    dr = tensor(dresidual[0], input.dtype).to(residual.dtype) if residual is not None else None
    if dr is not None and dr.stride() != dx.stride():
        dr = dr.new_empty_strided(dx.shape, dx.stride()).copy_(dr)
    return (
        dx,
        None if weight is None else copied(dweight, weight),
        None if bias is None else copied(dbias, bias),
        dr,
    )


def only_added(activation: Activation, residual: Tensor | None) -> torch.dtype | None:
    """The dtype of a residual whose gradient is dy: it is not kept, and may be changed in place, as after a sum."""
    return residual.dtype if residual is not None and activation is None else None


def moments_of(mean: Tensor, m2: Tensor, input: Tensor, num_groups: int) -> gn_fast.Moments:
    """What two tensors hold of them; each group has as many values."""
    count = np.full(tuple(mean.shape), math.prod(input.shape[1:]) // num_groups, np.int64)
    return gn_fast.Moments(count, array(mean), array(m2))

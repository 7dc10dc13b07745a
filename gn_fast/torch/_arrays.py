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


def format_of(input: Tensor) -> torch.memory_format:
    """That of a result: PyTorch's own group norm gives it the same strides."""
    if input.is_contiguous() and input.stride(1) != 1:  # and so not channels-last as well, which takes 1.6 us to find
        return contiguous_format
    return suggest_memory_format(input)


def along(form: torch.memory_format, tensor: Tensor | None) -> Any:
    """The tensor's memory as an array; of a copy in that format, if what is innermost there has steps here.

    As in one sample, or a sequence, that an attention gave. PyTorch copies it in a third to a sixth of the time in
    which the kernel gathers value by value.
    """
    if tensor is None:
        return None
    if tensor.stride(-1 if form is contiguous_format else 1) > 1:
        tensor = tensor.contiguous(memory_format=form)
    return array_of(tensor)


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
    form = format_of(input)
    y = torch.empty_like(input, memory_format=form)
    group_norm(
        along(form, input), num_groups, weight if weight is None else array_of(weight),
        bias if bias is None else array_of(bias), eps,
        residual=residual if residual is None else along(form, residual), activation=activation,
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
    form = format_of(input)
    y = torch.empty_like(input, memory_format=form)
    _, moments = group_norm(
        along(form, input), num_groups, array(weight), array(bias), eps,
        residual=along(form, residual), activation=activation, out=array(y), return_moments=True,
        num_threads=get_num_threads(),
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
    form = format_of(input)
    dx = torch.empty_like(input, memory_format=form)
    _, dweight, dbias, *dresidual = gn_fast.group_norm_backward(
        along(form, dy), along(form, input), num_groups, array(weight), array(bias), eps,
        residual=along(form, residual), activation=activation,
        moments=moments, out=array(dx), num_threads=get_num_threads(),
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

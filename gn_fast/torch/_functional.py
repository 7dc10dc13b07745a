"""`group_norm` of tensors: its checks, and which route a call takes.

A call in eager mode on plain CPU tensors goes to the kernel at once, under an `autograd.Function` if a gradient is
needed: registered operators take two to three times as long to call. What records or transforms calls sees an operator
(_operators.py) or PyTorch's own operations (_composed.py).
"""

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state as get_tracing_state
from torch._C import _len_torch_dispatch_stack as len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _arrays, _composed, _operators
from ._arrays import Activation

PLAIN = (Tensor, Parameter)
KEPT = 1 << 14  # values from which on the gradient is given statistics: fewer are summed again in less time, 0.8 us


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Group normalization of a CPU tensor: `torch.nn.functional.group_norm` by gn_fast's kernel.

    Parameters
    ----------
    input : Tensor
        (N, C, spatial...), float16, bfloat16, float32 or float64, of any strides.
    num_groups : int
        Divides C.
    weight, bias : Tensor, optional
        (C,), each of any of these dtypes.
    eps : float
        Added to the variance.
    activation : str or (str, float), optional
        Applied at the end, as in `gn_fast.group_norm`: ``"relu"``, ``"leaky_relu"`` or ``("leaky_relu", slope)``,
        ``"silu"`` or ``"swish"``, ``"gelu"``, ``"gelu_tanh"``, ``"mish"``, ``"hardswish"``, ``"sigmoid"``,
        ``"tanh"``.
    residual : Tensor, optional
        Of input's shape, added before the activation.

    Returns
    -------
    Tensor
        Of input's shape and dtype, and of the strides that PyTorch's result has: channels-last stays so.

    Raises
    ------
    RuntimeError
        If shapes or `num_groups` do not fit, or a tensor is not on the CPU.
    NotImplementedError
        If a dtype is another.
    ValueError
        If a group would have one value only, as in PyTorch, or the activation is not known.

    Notes
    -----
    Differentiable twice and more, also in forward mode and under `torch.func`; within `torch.compile` and
    `torch.export` it is an operator. Threads are those of `torch.get_num_threads`.

    Examples
    --------
    >>> import torch, gn_fast.torch
    >>> x = torch.randn(2, 8, 4, 4, requires_grad=True)
    >>> y = gn_fast.torch.group_norm(x, 2, activation="silu")
    >>> torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)))
    >>> y.sum().backward()
    """
    tensors = input, weight, bias, residual
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            group_norm, tensors, input, num_groups, weight, bias, eps, activation, residual
        )
    needs_gradient = is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if not is_compiling() and _is_plain(input, weight, bias, residual) and input.numel() != num_groups:
        try:
            if needs_gradient:
                return apply(*tensors, (num_groups, eps, activation))  # type: ignore[no-any-return, no-untyped-call]
            return _arrays.forward(input, num_groups, weight, bias, eps, activation, residual)
        except (TypeError, ValueError, LookupError, RuntimeError):
            _check(*tensors, num_groups, activation)
            if eps >= 0:
                raise
    _check(*tensors, num_groups, activation)
    if not is_compiling() and (
        peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or not eps >= 0
    ):
        return _composed.group_norm(*tensors, num_groups, eps, activation)
    arguments = input, num_groups, weight, bias, eps, *_operators.split(activation), residual
    if needs_gradient or get_tracing_state() is not None:  # which traces once more without gradients, and compares
        return torch.ops.gn_fast.group_norm_with_moments(*arguments)[0]  # type: ignore[no-any-return]
    return torch.ops.gn_fast.group_norm(*arguments)  # type: ignore[no-any-return]


def _is_plain(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether these are plain CPU tensors that fit, and nobody else wants to see the call: `torch.func`, a mode of
    dispatch, `jit.trace`, forward-mode differentiation.
    """
    return (
        type(input) in PLAIN
        and (weight is None or (type(weight) in PLAIN and weight.dim() == 1))
        and (bias is None or (type(bias) in PLAIN and bias.dim() == 1))
        and (residual is None or type(residual) in PLAIN)
        and input.is_cpu
        and peek_interpreter_stack() is None
        and not len_torch_dispatch_stack()
        and get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def _check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    activation: Activation,
) -> None:
    """What does not fit, in the words and of the types of PyTorch."""
    shape = input.shape
    if len(shape) < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {len(shape)}")
    channels = shape[1]
    if num_groups <= 0:
        raise RuntimeError(f"Expected num groups to be greater than 0, got {num_groups}")
    if channels % num_groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{list(shape)} and num_groups={num_groups}"
        )
    if input.numel() == num_groups and channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(shape)} and "
            f"num_groups={num_groups}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (len(t.shape) != 1 or t.shape[0] != channels):
            raise RuntimeError(
                f"Expected {name} to be a vector of size equal to the number of channels in input, but got {name} "
                f"of shape {list(t.shape)} and input of shape {list(shape)}"
            )
    if residual is not None and residual.shape != shape:
        raise RuntimeError(
            f"Expected residual to have the shape of input, {list(shape)}, not {list(residual.shape)}"
        )
    for name, t in (("input", input), ("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None:
            if t.dtype not in _arrays.DTYPES:
                raise NotImplementedError(
                    f"gn_fast.torch.group_norm takes float16, bfloat16, float32 and float64: {name} is {t.dtype}"
                )
            if not (t.is_cpu or t.is_meta):
                raise RuntimeError(f"gn_fast.torch.group_norm works on the CPU: {name} is on {t.device}")
            if t.device != input.device:
                raise RuntimeError(f"{name} must be on input's device, {input.device}, not on {t.device}")
    check_activation(activation)


def check_activation(activation: Any) -> None:
    """Raise ValueError unless it is one of those that are known, or None."""
    if isinstance(activation, tuple):
        known = (
            len(activation) == 2 and activation[0] == "leaky_relu" and isinstance(activation[1], int | float)
        )
    else:
        known = activation is None or (isinstance(activation, str) and activation in _composed.ACTIVATIONS)
    if not known:
        names = ", ".join(_composed.ACTIVATIONS)
        raise ValueError(
            f"activation must be one of {names}, ('leaky_relu', slope) or None, not {activation!r}"
        )


class _GroupNorm(torch.autograd.Function):
    """The kernel and its gradient, which PyTorch's operations compute where it is to be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: tuple[int, float, Activation],
    ) -> Tensor:
        num_groups, eps, activation = ctx.call = call
        ctx.added = _arrays.only_added(activation, residual)
        ctx.save_for_backward(input, weight, bias, residual if activation else None)
        if input.numel() < KEPT:
            ctx.moments = None
            return _arrays.forward(input, num_groups, weight, bias, eps, activation, residual)
        y, ctx.moments = _arrays.forward_with_moments(
            input, num_groups, weight, bias, eps, activation, residual
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        tensors = input, weight, bias, residual = ctx.saved_tensors
        num_groups, eps, activation = ctx.call
        if is_grad_enabled() or not _is_plain(dy, None, None, None) or _has_no_memory(dy):
            wanted = *ctx.needs_input_grad[:3], ctx.needs_input_grad[3] and residual is not None
            found = _composed.gradients(dy, tensors, wanted, *ctx.call)
        else:
            found = _arrays.backward(
                dy, input, num_groups, weight, bias, eps, activation, residual, ctx.moments
            )
        return *found[:3], found[3] if ctx.added is None else dy.to(ctx.added), None


def _has_no_memory(dy: Tensor) -> bool:
    """What autograd alone hands out: zeros that are not stored, or a batch of gradients as one."""
    return dy._is_zerotensor() or is_legacy_batchedtensor(dy)


# Less what Function adds for torch.func, which has another route: 1.5 us.
apply = super(torch.autograd.Function, _GroupNorm).apply

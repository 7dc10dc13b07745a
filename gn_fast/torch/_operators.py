"""The registered operators, for what records calls instead of carrying them out: `torch.compile`, `torch.export`,
`make_fx`, `jit.trace`, fake tensors, and tensors of other classes.

``gn_fast::group_norm`` is for calls that need no gradient, ``gn_fast::group_norm_with_moments`` for those that do, and
``gn_fast::group_norm_backward`` is that gradient. An activation is two arguments, its name and a slope.
"""

from typing import Any

import torch
from torch import Tensor

from . import _arrays, _composed

_ARGUMENTS = (
    "Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, str? activation, float slope, "
    "Tensor? residual"
)

torch.library.define("gn_fast::group_norm", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("gn_fast::group_norm_with_moments", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "gn_fast::group_norm_backward",
    f"(Tensor dy, {_ARGUMENTS}, Tensor mean, Tensor m2) -> (Tensor, Tensor, Tensor, Tensor)",
)


def split(activation: _arrays.Activation) -> tuple[str | None, float]:
    """An activation as two arguments."""
    return activation if isinstance(activation, tuple) else (activation, 0.01)


def join(activation: str | None, slope: float) -> _arrays.Activation:
    """The two arguments as an activation."""
    return (activation, slope) if activation == "leaky_relu" else activation


# ---- what they do ----------------------------------------------------------------------------------------


@torch.library.impl("gn_fast::group_norm", "CPU")
def _group_norm(input, num_groups, weight, bias, eps, activation, slope, residual):  # type: ignore[no-untyped-def]
    return _arrays.forward(input, num_groups, weight, bias, eps, join(activation, slope), residual)


@torch.library.impl("gn_fast::group_norm_with_moments", "CPU")
def _with_moments(input, num_groups, weight, bias, eps, activation, slope, residual):  # type: ignore[no-untyped-def]
    y, moments = _arrays.forward_with_moments(
        input, num_groups, weight, bias, eps, join(activation, slope), residual
    )
    return y, torch.from_numpy(moments.mean.copy()), torch.from_numpy(moments.m2.copy())


@torch.library.impl("gn_fast::group_norm_backward", "CPU")
def _backward(dy, input, num_groups, weight, bias, eps, activation, slope, residual, mean, m2):  # type: ignore[no-untyped-def]
    moments = _arrays.moments_of(mean, m2, input, num_groups)
    found = _arrays.backward(
        dy, input, num_groups, weight, bias, eps, join(activation, slope), residual, moments
    )
    return tuple(input.new_empty(0) if d is None else d for d in found)


# ---- what they give, without doing it --------------------------------------------------------------------


@torch.library.register_fake("gn_fast::group_norm")
def _fake_group_norm(input, *_):  # type: ignore[no-untyped-def]
    return _arrays.empty_like(input)


@torch.library.register_fake("gn_fast::group_norm_with_moments")
def _fake_with_moments(input, num_groups, *_):  # type: ignore[no-untyped-def]
    moments = [input.new_empty(input.shape[0], num_groups, dtype=torch.float64) for _ in range(2)]
    return _arrays.empty_like(input), *moments


@torch.library.register_fake("gn_fast::group_norm_backward")
def _fake_backward(dy, input, num_groups, weight, bias, eps, activation, slope, residual, mean, m2):  # type: ignore[no-untyped-def]
    return (
        _arrays.empty_like(input),
        input.new_empty(0) if weight is None else torch.empty_like(weight),
        input.new_empty(0) if bias is None else torch.empty_like(bias),
        input.new_empty(0) if residual is None else _arrays.empty_like(input).to(residual.dtype),
    )


# ---- their gradients -------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, num_groups, weight, bias, eps, activation, slope, residual = inputs
    mean, m2 = output[1:] if isinstance(output, tuple) else (None, None)
    ctx.call = num_groups, eps, activation, slope
    if mean is not None:
        ctx.mark_non_differentiable(mean, m2)
    ctx.save_for_backward(input, weight, bias, residual, mean, m2)


def _gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    input, weight, bias, residual, mean, m2 = ctx.saved_tensors
    num_groups, eps, activation, slope = ctx.call
    arguments = input, num_groups, weight, bias, eps, activation, slope, residual
    if mean is None:
        _, mean, m2 = torch.ops.gn_fast.group_norm_with_moments(*arguments)
    found = torch.ops.gn_fast.group_norm_backward(dy, *arguments, mean, m2)
    needed = (ctx.needs_input_grad[i] for i in (0, 2, 3, 7))
    dx, dw, db, dr = (d if need else None for d, need in zip(found, needed, strict=True))
    return dx, None, dw, db, None, None, None, dr


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, input, num_groups, weight, bias, eps, activation, slope, residual, _, _ = inputs
    ctx.call = num_groups, eps, join(activation, slope)
    ctx.save_for_backward(dy, input, weight, bias, residual)


def _second_gradient(ctx: Any, *ddx: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    with torch.enable_grad():
        tensors: list[Any]
        dy: Any
        dy, *tensors = (None if t is None else t.detach().requires_grad_() for t in saved)
        found = _composed.gradients(dy, tensors, [t is not None for t in tensors], *ctx.call)
        pairs = [(f, d) for f, d in zip(found, ddx, strict=True) if f is not None and d is not None]
        leaves = [t for t in (dy, *tensors) if t is not None]
        grads = iter(
            torch.autograd.grad([f for f, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
        )
    d_dy, dx, dw, db, dr = (None if t is None else next(grads) for t in saved)
    return d_dy, dx, None, dw, db, None, None, None, dr, None, None


torch.library.register_autograd("gn_fast::group_norm", _gradient, setup_context=_keep)
torch.library.register_autograd("gn_fast::group_norm_with_moments", _gradient, setup_context=_keep)
torch.library.register_autograd(
    "gn_fast::group_norm_backward", _second_gradient, setup_context=_keep_for_second
)

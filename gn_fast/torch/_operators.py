"""The registered operators, for what records calls instead of carrying them out: `torch.compile`, `torch.export`,
`make_fx`, `jit.trace`, fake tensors, and tensors of other classes.

``gn_fast::group_norm`` is for calls that need no gradient, ``gn_fast::group_norm_with_moments`` for those that do, and
``gn_fast::group_norm_backward`` is that gradient. An activation is two arguments, its name and a slope.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function as one_level
from torch._prims_common import suggest_memory_format
from torch.autograd.forward_ad import _set_fwd_grad_enabled as forward_mode

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


def _result_like(input: Tensor) -> Tensor:
    """In `_arrays.format_of`, without its short way: that asks for what may be a symbol and would become a guard."""
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


@torch.library.register_fake("gn_fast::group_norm")
def _fake_group_norm(input, *_):  # type: ignore[no-untyped-def]
    return _result_like(input)


@torch.library.register_fake("gn_fast::group_norm_with_moments")
def _fake_with_moments(input, num_groups, *_):  # type: ignore[no-untyped-def]
    moments = [input.new_empty(input.shape[0], num_groups, dtype=torch.float64) for _ in range(2)]
    return _result_like(input), *moments


@torch.library.register_fake("gn_fast::group_norm_backward")
def _fake_backward(dy, input, num_groups, weight, bias, eps, activation, slope, residual, mean, m2):  # type: ignore[no-untyped-def]
    return (
        _result_like(input),
        input.new_empty(0) if weight is None else torch.empty_like(weight),
        input.new_empty(0) if bias is None else torch.empty_like(bias),
        input.new_empty(0) if residual is None else _result_like(input).to(residual.dtype),
    )


# ---- their gradients -------------------------------------------------------------------------------------

# Not by torch.library.register_autograd: its operators silently give no tangent, and torch.func.grad refuses them.
# Compiled code comes upon both, as a call there cannot know what it is transformed by.


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, keyset: Any, *arguments: Any) -> Any:
        input, num_groups, weight, bias, eps, activation, slope, residual = arguments
        with torch.enable_grad(), forward_mode(True):  # for the levels of torch.func below this one
            found = _without_graph(operator, keyset, arguments)
        mean, m2 = found[1:] if isinstance(found, tuple) else (None, None)
        if mean is not None:
            ctx.mark_non_differentiable(mean, m2)
        ctx.call = num_groups, eps, activation, slope
        ctx.added = _arrays.only_added(activation, residual)
        ctx.save_for_backward(input, weight, bias, residual if activation else None, mean, m2)
        return found

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo fails at it, where compiled code is transformed
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        input, weight, bias, residual, mean, m2 = ctx.saved_tensors
        num_groups, eps, activation, slope = ctx.call
        arguments = input, num_groups, weight, bias, eps, activation, slope, residual
        if mean is None:
            _, mean, m2 = torch.ops.gn_fast.group_norm_with_moments(*arguments)
        dx, dw, db, dr = torch.ops.gn_fast.group_norm_backward(dy, *arguments, mean, m2)
        if ctx.added is not None:
            dr = dy.to(ctx.added)
        found = None, None, dx, None, dw, db, None, None, None, dr
        return tuple(d if need else None for d, need in zip(found, ctx.needs_input_grad, strict=True))


_apply = super(torch.autograd.Function, _Forward).apply  # less what Function adds to refuse torch.func


def _without_graph(operator: Any, keyset: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _with_graph(operator: Any, keyset: Any, arguments: tuple[Any, ...]) -> Any:
    with one_level():
        return _apply(operator, keyset, *arguments)  # type: ignore[no-untyped-call]


def _composed_forward(input, num_groups, weight, bias, eps, activation, slope, residual):  # type: ignore[no-untyped-def]
    return _composed.group_norm(input, weight, bias, residual, num_groups, eps, join(activation, slope))


def _composed_with_moments(input: Tensor, num_groups: int, *rest: Any) -> tuple[Tensor, ...]:
    plain = None, None, 1.0, None, 0.0, None
    _, mean, m2 = torch.ops.gn_fast.group_norm_with_moments(input.detach(), num_groups, *plain)
    return _composed_forward(input, num_groups, *rest), mean, m2  # type: ignore[no-untyped-call]


def _composed_backward(dy, input, num_groups, weight, bias, eps, activation, slope, residual, *_):  # type: ignore[no-untyped-def]
    tensors = input, weight, bias, residual
    wanted = [t is not None for t in tensors]
    found = _composed.gradients(dy, tensors, wanted, num_groups, eps, join(activation, slope))
    return tuple(input.new_empty(0) if d is None else d for d in found)


def _differentiable(name: str, with_graph: Callable[..., Any], composed: Callable[..., Any]) -> None:
    """Register what an operator does where derivatives are kept: it has a tangent, a graph, or neither."""
    operator = getattr(torch.ops.gn_fast, name).default

    def differentiable(keyset: Any, *arguments: Any) -> Any:
        tensors = [t for t in arguments if isinstance(t, Tensor)]
        if any(torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors):
            return composed(*arguments)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return with_graph(operator, keyset, arguments)
        return _without_graph(operator, keyset, arguments)

    _library.impl(name, differentiable, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


_library = torch.library.Library("gn_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_differentiable("group_norm", _with_graph, _composed_forward)
_differentiable("group_norm_with_moments", _with_graph, _composed_with_moments)
_differentiable("group_norm_backward", lambda _, __, arguments: _composed_backward(*arguments), _composed_backward)  # type: ignore[no-untyped-call]

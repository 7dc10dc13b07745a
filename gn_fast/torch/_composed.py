"""Group norm composed of PyTorch's operations, which have every derivative and every transformation: second
derivatives, forward-mode differentiation and `vmap` are made of it.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad as requires_grad_allowed

from ._arrays import Activation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    activation: Activation,
) -> Tensor:
    """y, computed in float32, or in float64 for a float64 input."""
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    parameters = (1, -1, *[1] * (input.dim() - 2))
    size = math.prod(input.shape[1:]) // num_groups
    x = input.to(work).reshape(input.shape[0], num_groups, size)
    x = x - x.mean(-1, keepdim=True)
    y = (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(input.shape)
    if weight is not None:
        y = y * weight.to(work).reshape(parameters)
    if bias is not None:
        y = y + bias.to(work).reshape(parameters)
    if residual is not None:
        y = y + residual.to(work)
    if isinstance(activation, tuple):
        y = F.leaky_relu(y, activation[1])
    elif activation is not None:
        y = ACTIVATIONS[activation](y)
    return y.to(input.dtype)


def gradients(
    dy: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],  # False where there is no tensor
    num_groups: int,
    eps: float,
    activation: Activation,
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual that are wanted, differentiable where gradients are enabled."""
    if not any(wanted):
        return (None,) * len(wanted)
    again = torch.is_grad_enabled()
    with torch.enable_grad(), requires_grad_allowed(True):
        # Views: an argument that is given twice, x as its own residual, has two gradients. Not by detach, which at one
        # level of torch.func cuts the levels below as well.
        views = [None if t is None else t.view_as(t) for t in tensors]
        for v, want in zip(views, wanted, strict=True):
            if v is not None and want:
                v.requires_grad_()
        y = group_norm(*views, num_groups, eps, activation)  # type: ignore[arg-type, call-arg]
        asked = [v for v, want in zip(views, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=again))  # type: ignore[arg-type]
    return tuple(next(found) if want else None for want in wanted)

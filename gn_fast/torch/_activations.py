"""What PyTorch's activations are called here: modules, functions and methods, each with known arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ._arrays import Activation


def _named(name: str) -> Callable[..., Activation]:
    return lambda inplace=False: name


def _gelu(approximate: str = "none") -> Activation:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    number = isinstance(negative_slope, int | float) and not isinstance(negative_slope, bool)
    return ("leaky_relu", negative_slope) if number and abs(negative_slope) < 3e38 else None  # what the kernel takes


_MODULES: Mapping[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: "relu",
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope),
    nn.SiLU: lambda m: "silu",
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.Mish: lambda m: "mish",
    nn.Hardswish: lambda m: "hardswish",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.Tanh: lambda m: "tanh",
}
_FUNCTIONS: Mapping[Any, Callable[..., Activation]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _named("relu")),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    F.silu: _named("silu"),
    F.gelu: _gelu,
    F.mish: _named("mish"),
    F.hardswish: _named("hardswish"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), _named("sigmoid")),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), _named("tanh")),
}


def of_module(module: nn.Module) -> Activation:
    """A module's activation; None for one that is not known, or that is a subclass."""
    find = _MODULES.get(type(module))
    return None if find is None else find(module)


def of_call(node: torch.fx.Node) -> Activation:
    """The activation that a function or method is applied as in a graph, or None."""
    find = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    try:
        return None if find is None else find(*node.args[1:], **node.kwargs)
    except TypeError:  # arguments of another meaning, such as out=
        return None

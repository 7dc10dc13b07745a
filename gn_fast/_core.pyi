"""The types of the compiled entry points; what they do is told where they are written, src/_core.pyx."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeAlias, final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .gradient_sums import GradientSums
from .moments import Moments

_Activation: TypeAlias = (
    Literal[
        "relu", "leaky_relu", "silu", "swish", "gelu", "gelu_tanh", "mish", "hardswish", "sigmoid", "tanh"
    ]
    | tuple[Literal["leaky_relu"], SupportsFloat | SupportsIndex]
    | None
)
_Gradient: TypeAlias = NDArray[Any] | Any  # None where the argument is: the caller knows, and need not ask


@overload
def group_norm(
    x: ArrayLike,
    num_groups: SupportsIndex,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: SupportsIndex = 1,
    residual: ArrayLike | None = None,
    activation: _Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    out: NDArray[Any] | None = None,
    return_moments: Literal[False] = False,
    num_threads: SupportsIndex | None = None,
) -> NDArray[Any]: ...
@overload
def group_norm(
    x: ArrayLike,
    num_groups: SupportsIndex,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: SupportsIndex = 1,
    residual: ArrayLike | None = None,
    activation: _Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    out: NDArray[Any] | None = None,
    return_moments: Literal[True],
    num_threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], Moments]: ...
@overload
def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    num_groups: SupportsIndex,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: SupportsIndex = 1,
    residual: None = None,
    activation: _Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    sums: GradientSums | None = None,
    out: NDArray[Any] | None = None,
    num_threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], _Gradient, _Gradient]: ...
@overload
def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    num_groups: SupportsIndex,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: SupportsIndex = 1,
    residual: ArrayLike,
    activation: _Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    sums: GradientSums | None = None,
    out: NDArray[Any] | None = None,
    num_threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], _Gradient, _Gradient, NDArray[Any]]: ...
def group_moments(
    x: ArrayLike,
    num_groups: SupportsIndex,
    *,
    axis: SupportsIndex = 1,
    mask: ArrayLike | None = None,
    num_threads: SupportsIndex | None = None,
) -> Moments: ...
def group_gradient_sums(
    dy: ArrayLike,
    x: ArrayLike,
    num_groups: SupportsIndex,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: SupportsIndex = 1,
    residual: ArrayLike | None = None,
    activation: _Activation = None,
    mask: ArrayLike | None = None,
    moments: Moments | None = None,
    num_threads: SupportsIndex | None = None,
) -> GradientSums: ...
def get_num_threads() -> int: ...
def set_num_threads(n: SupportsIndex | None) -> None: ...
@contextmanager
def num_threads(n: SupportsIndex) -> Iterator[None]: ...
def clear_pool() -> None: ...
def isa_levels() -> tuple[str, ...]: ...
@contextmanager
def use_isa(level: str) -> Iterator[None]: ...
@final
class _Tensors:
    def __new__(cls, tensors: type, bfloat16: np.dtype[Any]) -> _Tensors: ...
    def array(self, tensor: Any) -> NDArray[Any]: ...
def _config() -> dict[str, dict[str, Any]]: ...
def _processors() -> int: ...

"""`GroupNorm`, a `torch.nn.GroupNorm` whose forward is gn_fast's, with an activation if wanted."""

from typing import Any

from torch import Tensor, nn

from ._arrays import Activation
from ._functional import check_activation, group_norm


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` by gn_fast's kernel: the same arguments, parameters and state_dict.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.GroupNorm`: ``num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None``.
    activation : str or (str, float), optional
        Applied at the end, without another pass over memory; see `group_norm`.

    Raises
    ------
    ValueError
        If `num_groups` does not divide ``num_channels``, or the activation is not known.

    Examples
    --------
    >>> import torch, gn_fast.torch
    >>> norm = gn_fast.torch.GroupNorm(4, 16, activation="silu")
    >>> norm(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    activation: Activation

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        check_activation(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Input of shape (N, C, spatial...), normalized and activated."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, self.activation)

    def extra_repr(self) -> str:
        """The arguments, as PyTorch shows them."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + activation

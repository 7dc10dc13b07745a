"""The arrays of a case in a mode, and the check that every result passes before it is timed."""

import math
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import gn_fast
from gn_fast import reference

from .cases import Case, Mode

Array = NDArray[Any]

EPS = float(np.float32(1e-5))  # ONNX keeps it in float32, also for float64
MEAN = 0.5  # of x, in standard deviations


class Problem:
    """A case in a mode: `x`, `dy`, `weight`, `bias`, and an `out` whose memory has been used before.

    The channels are where the mode wants them, at `axis`; every array is C-contiguous.
    """

    def __init__(self, case: Case, mode: Mode) -> None:
        self.case, self.mode = case, mode
        self.num_groups = case.num_groups
        self.axis = -1 if mode.channels_last else 1
        self.dtype = np.dtype(ml_dtypes.bfloat16 if mode.dtype == "bfloat16" else mode.dtype)
        self.compute = np.dtype(np.float64 if mode.dtype == "float64" else np.float32)
        n, channels, *spatial = case.shape
        shape = (n, *spatial, channels) if mode.channels_last else case.shape
        rng = np.random.default_rng(0)
        x = rng.standard_normal(shape, self.compute)
        x += self.compute.type(MEAN)
        self.x = x.astype(self.dtype, copy=False)
        self.weight, self.bias = rng.uniform(0.5, 1.5, (2, channels)).astype(self.dtype)
        self.out = self.x.copy()
        if mode.backward:
            # Leaning on x, so that neither the sum of dy nor that of dy * xhat cancels to nothing.
            self.dy = rng.standard_normal(shape, self.compute) + self.x
            self.moments = gn_fast.group_moments(self.x, self.num_groups, axis=self.axis)

    def group(self, a: Array, g: int) -> Array:
        """The channels of one group of an array with channels: x, dy, or a weight."""
        size = len(self.weight) // self.num_groups
        channels = slice(g * size, (g + 1) * size)
        return a[channels] if a.ndim == 1 else a[..., channels] if self.axis == -1 else a[:, channels]

    @cached_property
    def expected(self) -> list[tuple[int, tuple[Array, ...]]]:
        """The exact results of the first and the last group, which do not depend on the others."""
        return [(g, self._exact(g)) for g in sorted({0, self.num_groups - 1})]

    def _exact(self, g: int) -> tuple[Array, ...]:
        x, weight, bias = (self.group(a, g).astype(np.float64) for a in (self.x, self.weight, self.bias))
        if self.mode.backward:
            dy = self.group(self.dy, g)
            return reference.group_norm_backward(dy, x, 1, weight, bias, EPS, axis=self.axis)
        activation = self.mode.activation
        return (reference.group_norm(x, 1, weight, bias, EPS, axis=self.axis, activation=activation),)

    def check(self, result: tuple[Array, ...], exact_sums: bool = False) -> None:
        """Assert that a result (y, or dx, dweight and dbias) is right.

        The bound, relative to the largest value: 8 roundings in the compute type, of numbers larger than the
        deviations by 1 + MEAN, as they still contain the mean; one to the storage type; and, unless sums are
        nearly exact, a random walk of one for each value that is summed.
        """
        values = max(self.case.slab_size, self.x.size // len(self.weight))
        roundings = 8 + (0 if exact_sums else math.sqrt(values))
        bound = roundings * (1 + MEAN) * _epsilon(self.compute) + _epsilon(self.dtype)
        names = ("dx", "dweight", "dbias") if self.mode.backward else ("y",)
        for g, exact in self.expected:
            for name, a, b in zip(names, result, exact, strict=True):
                error = np.max(np.abs(self.group(a, g) - b)) / np.max(np.abs(b))
                assert error <= bound, f"{name} of group {g} is off by {error:.2g}, more than {bound:.2g}"


def _epsilon(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).eps)

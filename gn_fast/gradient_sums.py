"""What a gradient needs to know of a whole slab, as one value: the sums of every channel.

How they are merged lives here; how they are computed from data does not.
"""

from dataclasses import dataclass
from operator import index
from typing import Self, SupportsIndex

import numpy as np
from numpy.typing import NDArray

__all__ = ["GradientSums"]


@dataclass(frozen=True, slots=True, eq=False)
class GradientSums:
    """The gradients with respect to weight and bias, of each channel of each sample.

    With dy' = dy * activation'(...), they are the sums over the positions of a channel that dx is
    made of, too: those of tiles, files or machines add up to those of the whole.

    Parameters
    ----------
    dweight : array_like of float, shape (N, C)
        The sums of dy' * xhat, xhat = (x - mean) * rstd; kept as float64.
    dbias : array_like of float, shape (N, C)
        The sums of dy'; kept as float64.

    Raises
    ------
    TypeError
        If one of them is not real.
    ValueError
        If the shapes differ or are not 2-D. NaN and infinity are allowed: they are what such
        values in the data leave behind.

    Notes
    -----
    Arrays that already have the right dtype are kept, not copied. Two instances compare by
    identity; compare their arrays with `numpy.testing`.

    Examples
    --------
    >>> s = GradientSums(dweight=[[0.5, -1.0]], dbias=[[2.0, 3.0]])
    >>> s.merge(s).dbias
    array([[4., 6.]])
    """

    dweight: NDArray[np.float64]
    dbias: NDArray[np.float64]

    def __post_init__(self) -> None:
        dweight, dbias = np.asarray(self.dweight), np.asarray(self.dbias)
        for name, array in (("dweight", dweight), ("dbias", dbias)):
            if array.dtype.kind not in "iuf":
                raise TypeError(f"{name} must be of a real dtype, got {array.dtype}")
        if dweight.ndim != 2:
            raise ValueError(f"dweight must have the shape (N, C), got {dweight.shape}")
        if dbias.shape != dweight.shape:
            raise ValueError(f"dbias must have dweight's shape {dweight.shape}, got {dbias.shape}")
        # A frozen dataclass is filled in through object, as its own __init__ does.
        object.__setattr__(self, "dweight", dweight.astype(np.float64, copy=False))
        object.__setattr__(self, "dbias", dbias.astype(np.float64, copy=False))

    @classmethod
    def _trusted(cls, dweight: NDArray[np.float64], dbias: NDArray[np.float64]) -> Self:
        """Skip the checks, which cost more than the sums of a small array."""
        self = object.__new__(cls)
        object.__setattr__(self, "dweight", dweight)
        object.__setattr__(self, "dbias", dbias)
        return self

    @staticmethod
    def zeros(n: SupportsIndex, c: SupportsIndex) -> "GradientSums":
        """Sums of nothing: what merging begins with, and what makes given moments constants.

        Parameters
        ----------
        n, c : int
            The number of samples and that of channels, at least 0.

        Returns
        -------
        GradientSums
            Of shape (n, c).

        Raises
        ------
        TypeError, ValueError
            If `n` or `c` is not an integer, or is negative.

        Examples
        --------
        >>> GradientSums.zeros(1, 2)
        GradientSums(dweight=array([[0., 0.]]), dbias=array([[0., 0.]]))
        """
        for name, value in (("n", n), ("c", c)):
            if not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if index(value) < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        return GradientSums._trusted(np.zeros((n, c)), np.zeros((n, c)))

    def merge(self, *others: "GradientSums") -> "GradientSums":
        """Sums of all the parts together, added in order.

        Parameters
        ----------
        *others : GradientSums
            The other parts, each of the same shape (N, C), taken with the same moments.

        Returns
        -------
        GradientSums
            A new instance. The order of the parts changes the last bits only.

        Raises
        ------
        TypeError
            If one of `others` is not a `GradientSums`.
        ValueError
            If one of `others` has another shape.

        Examples
        --------
        >>> import numpy as np
        >>> from gn_fast.reference import group_gradient_sums, group_moments
        >>> x = np.arange(48.0).reshape(1, 4, 12)
        >>> m, dy = group_moments(x, 2), x % 5
        >>> left, right = (
        ...     group_gradient_sums(dy[..., part], x[..., part], 2, moments=m)
        ...     for part in (slice(0, 8), slice(8, 12)))
        >>> whole = group_gradient_sums(dy, x, 2)
        >>> np.allclose(left.merge(right).dweight, whole.dweight, rtol=0, atol=1e-13)
        True
        """
        dweight, dbias = self.dweight.copy(), self.dbias.copy()
        with np.errstate(all="ignore"):
            for part in others:
                if not isinstance(part, GradientSums):
                    raise TypeError(f"others must be GradientSums, got {type(part).__name__}")
                if part.dweight.shape != dweight.shape:
                    raise ValueError(f"others must have the shape {dweight.shape}, got {part.dweight.shape}")
                dweight += part.dweight
                dbias += part.dbias
        return GradientSums._trusted(dweight, dbias)

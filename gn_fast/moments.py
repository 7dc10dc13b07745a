"""The statistics of every slab as one value: count, mean and sum of squared deviations.

How they are merged and read lives here; how they are computed from data does not.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Moments"]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of each sample's groups.

    These three can be merged exactly (up to rounding), which a mean and a variance alone cannot:
    the moments of tiles, files or machines add up to the moments of the whole.

    Parameters
    ----------
    count : array_like of int, shape (N, G)
        Number of elements that were counted; kept as int64.
    mean : array_like of float, shape (N, G)
        Their mean, 0 where nothing was counted; kept as float64.
    m2 : array_like of float, shape (N, G)
        The sum of their squared deviations from the mean, 0 where nothing was counted; kept as
        float64.

    Raises
    ------
    TypeError
        If `count` is not of an integer dtype, or `mean` or `m2` is not real.
    ValueError
        If the shapes differ or are not 2-D, or `count` or `m2` is negative. NaN is allowed in
        `mean` and `m2`: it is what a NaN or an infinity in the data leaves behind.

    Notes
    -----
    Arrays that already have the right dtype are kept, not copied. Two instances compare by
    identity; compare their arrays with `numpy.testing`.

    Examples
    --------
    >>> m = Moments(count=[[4]], mean=[[2.5]], m2=[[5.0]])
    >>> m.var
    array([[1.25]])
    >>> m.rstd(eps=0.3125)
    array([[0.8]])
    """

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    def __post_init__(self) -> None:
        count, mean, m2 = (np.asarray(a) for a in (self.count, self.mean, self.m2))
        if count.dtype.kind not in "iu":
            raise TypeError(f"count must be of an integer dtype, got {count.dtype}")
        for name, array in (("mean", mean), ("m2", m2)):
            if array.dtype.kind not in "iuf":
                raise TypeError(f"{name} must be of a real dtype, got {array.dtype}")
        if count.ndim != 2:
            raise ValueError(f"count must have the shape (N, G), got {count.shape}")
        for name, array in (("mean", mean), ("m2", m2)):
            if array.shape != count.shape:
                raise ValueError(f"{name} must have count's shape {count.shape}, got {array.shape}")
        for name, array in (("count", count), ("m2", m2)):
            if np.any(array < 0):
                raise ValueError(f"{name} must not be negative, got {array.min()}")
        # A frozen dataclass is filled in through object, as its own __init__ does.
        object.__setattr__(self, "count", count.astype(np.int64, copy=False))
        object.__setattr__(self, "mean", mean.astype(np.float64, copy=False))
        object.__setattr__(self, "m2", m2.astype(np.float64, copy=False))

    @classmethod
    def _trusted(
        cls, count: NDArray[np.int64], mean: NDArray[np.float64], m2: NDArray[np.float64]
    ) -> Self:
        """Skip the checks, which cost more than the moments of a small array."""
        self = object.__new__(cls)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "m2", m2)
        return self

    @property
    def var(self) -> NDArray[np.float64]:
        """Population variance m2 / count, float64 of shape (N, G); 0 where count is 0.

        Examples
        --------
        >>> Moments(count=[[4, 0]], mean=[[2.5, 0.0]], m2=[[5.0, 0.0]]).var
        array([[1.25, 0.  ]])
        """
        variance: NDArray[np.float64] = self._or_zero(self.m2) / np.maximum(self.count, 1)
        return variance

    def rstd(self, eps: float = 1e-5) -> NDArray[np.float64]:
        """Reciprocal standard deviation 1 / sqrt(var + eps), float64 of shape (N, G).

        Parameters
        ----------
        eps : float
            Added to the variance inside the root. With 0, a constant slab has an infinite rstd.

        Examples
        --------
        >>> Moments(count=[[2]], mean=[[0.0]], m2=[[8.0]]).rstd(eps=0.0)
        array([[0.5]])
        """
        with np.errstate(divide="ignore"):
            rstd: NDArray[np.float64] = 1.0 / np.sqrt(self.var + eps)
        return rstd

    def merge(self, *others: "Moments") -> "Moments":
        """Moments of all the parts together, as if their elements had been counted at once.

        Parameters
        ----------
        *others : Moments
            The other parts, each of the same shape (N, G). A part that counted nothing changes
            nothing.

        Returns
        -------
        Moments
            A new instance. The order of the parts changes the last bits only.

        Raises
        ------
        TypeError
            If one of `others` is not a `Moments`.
        ValueError
            If one of `others` has another shape.

        Notes
        -----
        The pairwise update of Chan, Golub and LeVeque, "Algorithms for Computing the Sample
        Variance: Analysis and Recommendations", The American Statistician 37 (1983): with
        delta = mean_b - mean_a,

            mean = mean_a + delta * count_b / count
            m2   = m2_a + m2_b + delta**2 * count_a * count_b / count

        Examples
        --------
        An image that is seen as two tiles of different size:

        >>> import numpy as np
        >>> from gn_fast.reference import group_moments, group_norm
        >>> x = np.arange(48.0).reshape(1, 4, 12)
        >>> tiles = x[..., :8], x[..., 8:]
        >>> whole = group_moments(tiles[0], 2).merge(group_moments(tiles[1], 2))
        >>> whole.count, whole.mean
        (array([[24, 24]]), array([[11.5, 35.5]]))
        >>> y = np.concatenate([group_norm(tile, 2, moments=whole) for tile in tiles], axis=-1)
        >>> np.allclose(y, group_norm(x, 2), rtol=0, atol=1e-15)
        True
        """
        count, mean, m2 = self.count, self._or_zero(self.mean), self._or_zero(self.m2)
        with np.errstate(all="ignore"):
            for part in others:
                if not isinstance(part, Moments):
                    raise TypeError(f"others must be Moments, got {type(part).__name__}")
                if part.count.shape != count.shape:
                    raise ValueError(
                        f"others must have the shape {count.shape}, got {part.count.shape}"
                    )
                total = count + part.count
                delta = part._or_zero(part.mean) - mean
                step = delta * (part.count / np.maximum(total, 1))
                # In this order an empty part adds exactly 0, however large the other's mean.
                m2 = m2 + part._or_zero(part.m2) + (step * count) * delta
                mean = mean + step
                count = total
        return Moments._trusted(count, mean, m2)

    def _or_zero(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(self.count == 0, 0.0, values)

"""A layer that keeps its parameters and their gradients, for networks in plain NumPy: `GroupNorm`.

What is computed, and the checks of what is computed with, live in the compiled functions.
"""

from collections.abc import Mapping
from operator import index
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._core import group_norm, group_norm_backward
from .reference import Activation

__all__ = ["GroupNorm"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_DIMS = 64  # NumPy's
# Steps to find out whether elements of two arrays share memory, after which it is taken for granted.
OVERLAP_WORK = 100_000
NOT_CALLED = "backward needs a call of the layer before it: it is the gradient of the last one"


class IncompatibleKeys(NamedTuple):
    """What `GroupNorm.load_state_dict` did not find, and what it did not look for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class GroupNorm:
    """Group normalization as a layer: its parameters, the gradient of its last call, and its state.

    ``layer(x)`` is `group_norm` with the layer's options and parameters, ``layer.backward(dy)`` is
    `group_norm_backward` of that call.

    Parameters
    ----------
    num_groups : int
        How many groups the channels are in; must divide `num_channels`.
    num_channels : int
        The number of channels C of what the layer is called on.
    eps : float
        Added to the variance inside the root; at least 0.
    weight, bias : bool
        Whether each channel has a scale, ones to begin with, and a shift, zeros to begin with.
    axis : int
        The dimension of the channels: 1, or -1 for channels last; not that of the samples.
    activation : str or tuple, optional
        What is applied to the result, as for `group_norm`.
    dtype : dtype
        Of the parameters and their gradients: float16, bfloat16 (of ``ml_dtypes``), float32 or
        float64. Results have the dtype of the x that the layer is called on.

    Attributes
    ----------
    weight, bias : ndarray of dtype, shape (C,), or None
        The parameters, to be changed in place or replaced.
    grads : dict of ndarray
        By the parameters' names, the sums of their gradients over the calls of `backward`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names it.
    ImportError
        For bfloat16 without ``ml_dtypes``.

    Notes
    -----
    A layer refers to the arrays of its last call until the next one. Copies, and what is pickled,
    have the parameters and ``grads``, but not that call. ``repr`` shows the options, not the values:
    evaluated, it gives a layer as it began.

    Examples
    --------
    Two steps of gradient descent towards a target:

    >>> import numpy as np
    >>> import gn_fast
    >>> rng = np.random.default_rng(0)
    >>> x, target = rng.standard_normal((2, 4, 8, 5, 5), np.float32)
    >>> layer = gn_fast.GroupNorm(2, 8, activation="silu")
    >>> losses = []
    >>> for _ in range(2):
    ...     difference = layer(x) - target
    ...     losses.append((difference**2).mean())
    ...     layer.zero_grad()
    ...     dx = layer.backward(2 * difference / difference.size)
    ...     layer.weight -= 0.1 * layer.grads["weight"]
    ...     layer.bias -= 0.1 * layer.grads["bias"]
    >>> bool(losses[1] < losses[0])
    True
    >>> layer
    GroupNorm(2, 8, activation='silu')

    The parameters of the same layer in PyTorch, or from ``np.load``, are taken by their names:

    >>> layer.load_state_dict({"weight": np.full(8, 0.5), "bias": np.zeros(8)})
    IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    """

    def __init__(
        self,
        num_groups: SupportsIndex,
        num_channels: SupportsIndex,
        eps: float = 1e-5,
        *,
        weight: bool = True,
        bias: bool = True,
        axis: SupportsIndex = 1,
        activation: Activation = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        self.num_channels = _integer(num_channels, "num_channels")
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, not {num_channels!r}")
        self.axis = _integer(axis, "axis")
        for name, value in (("weight", weight), ("bias", bias)):
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name} must be True or False, not {value!r}: load_state_dict sets values")
        # The rest is what group_norm takes, and is shown to it: no samples, in the dimensions of axis.
        shape = [0] + [1] * min(max(self.axis, -self.axis, 1), MAX_DIMS - 1)
        if 0 < abs(self.axis) < MAX_DIMS:
            shape[self.axis] = self.num_channels
        group_norm(np.empty(shape), num_groups, eps=eps, axis=axis, activation=activation)  # type: ignore[arg-type]
        self.num_groups = index(num_groups)
        self.eps = float(eps)
        self.activation: Any = activation if activation is None else str(activation)
        if isinstance(activation, tuple):
            self.activation = ("leaky_relu", float(activation[1]))
        self.dtype = _dtype(dtype)
        self.weight = np.ones(self.num_channels, self.dtype) if weight else None
        self.bias = np.zeros(self.num_channels, self.dtype) if bias else None
        self.grads = {name: np.zeros_like(value) for name, value in self._parameters().items()}
        self._called: dict[str, Any] | str = NOT_CALLED  # what the last call left, or why it left nothing

    def __call__(
        self,
        x: ArrayLike,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Normalize x; `backward` is then that of this call.

        Parameters
        ----------
        x : array_like, shape (N, C, *spatial), or with the channels at `axis`
            As for `group_norm`.
        residual, mask
            As for `group_norm`.
        out : ndarray, x's shape and dtype, optional
            Where to write the result. It may be x itself, or overlap an input in any way; after such
            a call there is no `backward`, as what it needs is lost.

        Returns
        -------
        ndarray
            `out`, or a new array of x's shape, dtype and order of memory.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described. The message names it; `out` and what `backward` knows
            are then as they were.
        """
        self._check_channels(x)
        y, moments = group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, axis=self.axis, activation=self.activation,
            residual=residual, mask=mask, out=out, return_moments=True,
        )  # fmt: skip
        inputs = {"x": x, "residual": residual, "mask": mask}
        lost = [name for name, value in inputs.items() if out is not None and _overlap(out, value)]
        self._called = {**inputs, "moments": moments}
        if lost:
            self._called = f"backward needs the last call's {' and '.join(lost)}, where it wrote its out"
        return y

    def backward(self, dy: ArrayLike) -> Any:
        """Gradients of sum(dy * y), y being the result of the last call.

        Those of the parameters are added to ``grads``. The parameters, and what the call was given, must
        be as they were then: they are kept by reference, not copied. Each further call of `backward` adds
        once more.

        Parameters
        ----------
        dy : array_like, y's shape
            The gradient with respect to y; any float dtype, any order of memory.

        Returns
        -------
        dx : ndarray
            A new array of x's shape, dtype and order of memory; where the call had a residual, the tuple
            (dx, dresidual).

        Raises
        ------
        RuntimeError
            If the layer was not called yet, or its last call wrote over what is needed (``out=x``).
        TypeError, ValueError
            If `dy` is not as described. ``grads`` is then as it was.
        """
        if isinstance(self._called, str):
            raise RuntimeError(self._called)
        dx, dweight, dbias, *dresidual = group_norm_backward(
            dy, num_groups=self.num_groups, weight=self.weight, bias=self.bias, eps=self.eps, axis=self.axis,
            activation=self.activation, **self._called,
        )  # fmt: skip
        for name, gradient in (("weight", dweight), ("bias", dbias)):
            if gradient is not None:
                self.grads[name] += gradient
        return (dx, *dresidual) if dresidual else dx

    def zero_grad(self) -> None:
        """Set the gradients to zero, in place."""
        for gradient in self.grads.values():
            gradient[...] = 0

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of the parameters that there are, by PyTorch's names: "weight", "bias"."""
        return {name: value.copy() for name, value in self._parameters().items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike], strict: bool = True) -> IncompatibleKeys:
        """Set the parameters, in place, to the values of a state, rounded to the layer's dtype.

        Parameters
        ----------
        state : mapping of str to array_like, shape (C,)
            As `state_dict` returns it, or that of PyTorch's layer on a CPU, or what ``np.load`` reads of an
            ``.npz`` file.
        strict : bool
            Whether the names must be those of the parameters. If not, those that are on one side only are
            left alone.

        Returns
        -------
        IncompatibleKeys
            A named tuple of the lists ``missing_keys`` and ``unexpected_keys``.

        Raises
        ------
        RuntimeError
            With PyTorch's texts, for all keys that are missing or unexpected (if `strict`), and for all
            values of another shape or not of numbers. Unlike in PyTorch, nothing is then loaded.
        TypeError
            If `state` is not a mapping.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, not {type(state).__name__}")
        parameters = self._parameters()
        missing = [name for name in parameters if name not in state]
        unexpected = [name for name in state if name not in parameters]
        errors = []
        if strict and missing:
            errors.append(f"Missing key(s) in state_dict: {_quoted(missing)}. ")
        if strict and unexpected:
            errors.append(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}. ")
        loaded = []
        for name, parameter in parameters.items():
            if name in missing:
                continue
            try:
                value = np.asarray(state[name])
                if not np.can_cast(value.dtype, np.float64):
                    raise TypeError(f"{name} must be of numbers up to float64, not of dtype {value.dtype}")
            except (TypeError, ValueError, RuntimeError) as error:
                errors.append(f'While copying the parameter named "{name}", an exception occurred: {error}.')
                continue
            if value.shape != parameter.shape:
                errors.append(
                    f"size mismatch for {name}: copying a param with shape {value.shape} from checkpoint, "
                    f"the shape in current model is {parameter.shape}."
                )
            loaded.append((parameter, value))
        if errors:
            errors.insert(0, f"Error(s) in loading state_dict for {type(self).__name__}:")
            raise RuntimeError("\n\t".join(errors))
        for parameter, value in loaded:
            parameter[...] = value
        return IncompatibleKeys(missing, unexpected)

    def __repr__(self) -> str:
        options = {
            "eps": self.eps,
            "weight": self.weight is not None,
            "bias": self.bias is not None,
            "axis": self.axis,
            "activation": self.activation,
            "dtype": self.dtype.name,
        }
        defaults = {"eps": 1e-5, **(GroupNorm.__init__.__kwdefaults__ or {})}
        others = [f"{name}={value!r}" for name, value in options.items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join((str(self.num_groups), str(self.num_channels), *others))})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_called": NOT_CALLED}

    def _parameters(self) -> dict[str, NDArray[Any]]:
        named = {"weight": self.weight, "bias": self.bias}
        return {name: value for name, value in named.items() if value is not None}

    def _check_channels(self, x: ArrayLike) -> None:
        try:
            channels = np.shape(x)[self.axis]
        except (IndexError, ValueError):
            return  # group_norm says what is wrong with it
        if channels != self.num_channels:
            raise ValueError(
                f"x must have {self.num_channels} channels in dimension {self.axis}, not {channels}: "
                f"its shape is {tuple(np.shape(x))}"
            )


def _integer(value: SupportsIndex, name: str) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def _dtype(value: DTypeLike) -> np.dtype[Any]:
    if isinstance(value, str) and value == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401  # NumPy then knows the name
        except ModuleNotFoundError as error:
            raise ImportError(
                "dtype 'bfloat16' needs ml_dtypes, which is not installed: pip install 'gn_fast[bfloat16]'",
                name=error.name,
            ) from error
    try:
        dtype = None if value is None else np.dtype(value).newbyteorder("=")  # None is NumPy's float64
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise TypeError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {value!r}")
    return dtype


def _overlap(out: NDArray[Any], value: Any) -> bool:
    """Whether an input has values where out lies."""
    if value is None:
        return False
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        value = np.from_dlpack(value)
    return bool(np.may_share_memory(out, value, max_work=OVERLAP_WORK))  # type: ignore[arg-type]


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)

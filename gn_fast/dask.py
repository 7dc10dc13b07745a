"""Group normalization of dask arrays: larger than memory, and larger than a machine.

How a call is cut into tasks, and how what the tasks find is merged, lives here; what a task computes does
not: each calls gn_fast's functions for NumPy on its chunk.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import dask.array as da
except ModuleNotFoundError as _error:
    raise ImportError(
        "gn_fast.dask needs dask, which is not installed: pip install 'gn_fast[dask]'", name=_error.name
    ) from _error

import gn_fast

from .gradient_sums import GradientSums
from .moments import Moments

if TYPE_CHECKING:
    from ._core import _Activation

__all__ = ["group_norm", "group_norm_backward"]

Block = NDArray[Any]
Statistics = Moments | GradientSums

# Statistics as elements of an array, which dask can slice, reduce and send.
_MOMENTS = np.dtype([("count", np.int64), ("mean", np.float64), ("m2", np.float64)])
_SUMS = np.dtype([("dweight", np.float64), ("dbias", np.float64)])
_FAN_IN = 8  # of a merge: a tree of few levels, whose tasks hold few parts at once


def group_norm(
    x: da.Array,
    num_groups: SupportsIndex,
    weight: ArrayLike | da.Array | None = None,
    bias: ArrayLike | da.Array | None = None,
    eps: float = 1e-5,
    *,
    axis: SupportsIndex = 1,
    residual: ArrayLike | da.Array | None = None,
    activation: "_Activation" = None,
    mask: ArrayLike | da.Array | None = None,
    moments: Moments | None = None,
    return_moments: bool = False,
    num_threads: SupportsIndex | None = 1,
) -> Any:
    """Group normalization of a dask array: :func:`gn_fast.group_norm` of its whole, chunk by chunk.

    Where chunks hold whole slabs (all positions of their groups), each is one call of the kernel. Where they
    cut positions, the moments of all chunks are merged in a tree, with which each chunk is then normalized.

    Parameters
    ----------
    x : dask.array.Array, shape (N, C, spatial...), or with the channels at `axis`
        Of NumPy arrays in chunks of known sizes, cut anywhere; only where a chunk cuts a group of channels,
        the channels are rechunked.
    num_groups, eps, axis, activation
        As for :func:`gn_fast.group_norm`.
    weight, bias, residual, mask : array_like or dask.array.Array, optional
        Of the shapes that :func:`gn_fast.group_norm` takes; rechunked to the chunks of x where theirs are
        others.
    moments : Moments, shape (N, G), optional
        Use these statistics instead of x's own. Their arrays are NumPy's or dask's, as `return_moments` gave
        them.
    return_moments : bool
        Also return the statistics that were used.
    num_threads : int or None, optional
        At most so many threads in each task: 1, as the scheduler runs tasks side by side. With None what
        :func:`gn_fast.get_num_threads` says where the task runs.

    Returns
    -------
    y : dask.array.Array
        Of x's shape, dtype (float64 for integers) and chunks, but for channels that were rechunked; each
        chunk has the order of memory of x's. Nothing is computed yet.
    moments : Moments
        Only with ``return_moments=True``: `moments` as they were given, or a :class:`gn_fast.Moments` of dask
        arrays. Its ``var``, ``rstd`` and ``merge`` are lazy too, and ``dask.compute`` makes it one of NumPy
        arrays.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described: before anything is computed, in the words of
        :func:`gn_fast.group_norm`.

    See Also
    --------
    group_norm_backward : its gradient.

    Notes
    -----
    For given chunks the result has the same bits under any scheduler, any number of workers and threads:
    parts are merged in the order of the chunks, at most eight to a task. Errors are bounded as those of
    :func:`gn_fast.group_norm`.

    Examples
    --------
    >>> import dask.array as da
    >>> import gn_fast.dask
    >>> x = da.random.default_rng(0).random((2, 8, 64, 64), chunks=(1, 8, 32, 64))
    >>> y, moments = gn_fast.dask.group_norm(x, 4, return_moments=True)
    >>> y.chunks == x.chunks
    True
    >>> bool(abs(y[0, :2].std() - 1) < 1e-3)  # computed here
    True
    >>> moments.mean
    dask.array<mean, shape=(2, 4), dtype=float64, chunksize=(1, 4), chunktype=numpy.ndarray>
    """
    call = _Call(x, num_groups, weight, bias, eps, axis, residual, activation, mask, moments, num_threads)
    if return_moments or not call.has_whole_slabs:
        call.find_moments()
    y = call.tasks("group-norm", _norm, call.dtype)
    if not return_moments:
        return y
    return y, moments or Moments._trusted(*_fields(call.arrays["moments"][0]))


def group_norm_backward(
    dy: ArrayLike | da.Array,
    x: da.Array,
    num_groups: SupportsIndex,
    weight: ArrayLike | da.Array | None = None,
    bias: ArrayLike | da.Array | None = None,
    eps: float = 1e-5,
    *,
    axis: SupportsIndex = 1,
    residual: ArrayLike | da.Array | None = None,
    activation: "_Activation" = None,
    mask: ArrayLike | da.Array | None = None,
    moments: Moments | None = None,
    num_threads: SupportsIndex | None = 1,
) -> tuple[Any, ...]:
    """The gradient of :func:`group_norm`: :func:`gn_fast.group_norm_backward` of the whole, chunk by chunk.

    Where chunks cut positions, the gradient's sums of all chunks are merged in a tree, as the moments are.

    Parameters
    ----------
    dy : dask.array.Array or array_like, x's shape
        The gradient with respect to y; rechunked to the chunks of x where its own are others.
    x, num_groups, weight, bias, eps, axis, residual, activation, mask, num_threads
        As for :func:`group_norm`, with the values of the forward call.
    moments : Moments, shape (N, G), optional
        x's statistics as the forward call returned them; without them they are computed again.

    Returns
    -------
    dx : dask.array.Array
        Of x's shape and dtype, in the chunks of y.
    dweight, dbias : dask.array.Array or None
        Of weight's and bias's shape, dtype and chunks, summed in float64 in a fixed order; None where they
        are absent.
    dresidual : dask.array.Array
        Only if `residual` is given: of dx's dtype and chunks.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described: before anything is computed.

    Notes
    -----
    Compute what is needed of these in one ``dask.compute``, so that tasks in common run once. The gradient is
    told of in :func:`gn_fast.group_norm_backward`, bits in :func:`group_norm`.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import gn_fast.dask
    >>> x, dy = da.random.default_rng(0).random((2, 2, 8, 64, 64), chunks=(2, 1, 8, 32, 64))
    >>> dx, dweight, _ = gn_fast.dask.group_norm_backward(dy, x, 4, weight=da.ones(8))
    >>> dx, dweight = dask.compute(dx, dweight)
    >>> dx.shape, dweight.shape
    ((2, 8, 64, 64), (8,))
    """
    call = _Call(x, num_groups, weight, bias, eps, axis, residual, activation, mask, moments, num_threads, dy)
    if not call.has_whole_slabs:
        call.find_moments()
        call.find_sums()
    gradients = call.tasks("group-norm-backward", _gradients, call.dtype)  # whose blocks are tuples
    dx = call.item(gradients, 0, call.dtype)
    if call.has_whole_slabs:
        dweight, dbias = (call.item_of_parameter(gradients, i, name) for i, name in ((1, "weight"), (2, "bias")))
    else:
        dweight, dbias = _fields(call.arrays["sums"][0])
    found = dx, call.gradient_of("weight", weight, dweight), call.gradient_of("bias", bias, dbias)
    return found if residual is None else (*found, call.item(gradients, 3, call.dtype))


class _Call:
    """The arguments of a call, checked and cut into the same blocks."""

    def __init__(
        self,
        x: Any,
        num_groups: Any,
        weight: Any,
        bias: Any,
        eps: Any,
        axis: Any,
        residual: Any,
        activation: Any,
        mask: Any,
        moments: Any,
        num_threads: Any,
        dy: Any = None,
    ) -> None:
        if not isinstance(x, da.Array):
            raise TypeError(f"x must be a dask.array.Array, not {type(x).__name__}")
        options = {"eps": eps, "axis": axis, "activation": activation, "num_threads": num_threads}
        arrays = {"weight": weight, "bias": bias, "residual": residual, "mask": mask, "moments": moments}
        _check(x if dy is None else dy, x, num_groups, arrays, options)

        self.axis = axis = int(axis) % x.ndim
        self.options = options | {"axis": axis}
        self.num_groups = int(num_groups)
        self.size = x.shape[axis] // self.num_groups  # channels of a group
        x = _array(x)
        x = x.rechunk({axis: _whole_groups(x.chunks[axis], self.size)})
        self.groups = tuple(c // self.size if self.size else self.num_groups for c in x.chunks[axis])
        self.dtype = x.dtype.newbyteorder("=") if x.dtype.kind not in "iub" else np.dtype(np.float64)
        self.index = tuple(range(x.ndim))
        self.spatial = tuple(i for i in self.index if i not in (0, axis))
        self.has_whole_slabs = all(x.numblocks[i] == 1 for i in self.spatial)

        # What a block of x goes with: each argument's array and the dimensions of x that it has.
        self.arrays: dict[str, tuple[Any, tuple[int, ...]]] = {"x": (x, self.index)}
        for name, value in (("dy", dy), ("residual", residual)):
            if value is not None:
                self.arrays[name] = _chunked(value, x.chunks), self.index
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                self.arrays[name] = self.parameter(_array(value))
        if mask is not None:
            whole = _array(mask)
            whole = whole[(None,) * (x.ndim - whole.ndim)]
            cut = tuple(x.chunks[i] if size > 1 else (size,) for i, size in enumerate(whole.shape))
            self.arrays["mask"] = _chunked(whole, cut), self.index
        if moments is not None:
            slabs = x.chunks[0], self.groups
            fields = [_chunked(getattr(moments, field), slabs) for field in _MOMENTS.names or ()]
            meta = np.empty((0, 0), _MOMENTS)
            self.use("moments", da.map_blocks(_packed_moments, *fields, dtype=_MOMENTS, meta=meta))

    def parameter(self, a: Any) -> tuple[Any, tuple[int, ...]]:
        """A weight or bias as (), (C,) or (N, C), without its ones."""
        x = self.arrays["x"][0]
        if a.ndim == 0:
            return _chunked(a, ()), ()
        n, c = x.shape[0], x.shape[self.axis]
        if a.size == c:
            return _chunked(a.reshape(c), (x.chunks[self.axis],)), (self.axis,)
        return _chunked(a.reshape(n, c), (x.chunks[0], x.chunks[self.axis])), (0, self.axis)

    def use(self, name: str, statistics: Any) -> None:
        self.arrays[name] = statistics, (0, self.axis)

    def tasks(
        self, token: str, work: Callable[..., Any], dtype: Any, *, among: tuple[str, ...] = (), **adjust: Any
    ) -> Any:
        """A block of the result for each of x."""
        arrays = {name: a for name, a in self.arrays.items() if not among or name in among}
        work = functools.partial(
            work, names=tuple(arrays), size=self.size, num_groups=self.num_groups, options=self.options
        )
        pairs = [each for pair in arrays.values() for each in pair]
        meta = np.empty((0,) * len(self.index), dtype)
        return da.blockwise(work, self.index, *pairs, token=token, align_arrays=False, dtype=dtype, meta=meta, **adjust)

    def find_moments(self) -> None:
        """Use the moments of the slabs, merged from those of chunks, unless they are given."""
        if "moments" in self.arrays:
            return
        adjust = {i: (1,) * self.arrays["x"][0].numblocks[i] for i in self.spatial} | {self.axis: self.groups}
        parts = self.tasks("group-moments", _moments, _MOMENTS, among=("x", "mask"), adjust_chunks=adjust)
        self.use("moments", self.merged(parts, "merge-moments"))

    def find_sums(self) -> None:
        adjust = {i: (1,) * self.arrays["x"][0].numblocks[i] for i in self.spatial}
        parts = self.tasks("group-gradient-sums", _sums, _SUMS, adjust_chunks=adjust)
        self.use("sums", self.merged(parts, "merge-gradient-sums"))

    def merged(self, parts: Any, name: str) -> Any:
        """Of shape (N, G) or (N, C): merged over the positions, in the order of the chunks."""
        if not self.spatial:
            return parts
        return da.reduction(
            parts, _itself, _merged, axis=self.spatial, dtype=parts.dtype, split_every=_FAN_IN,
            concatenate=True, name=name, meta=np.empty((0, 0), parts.dtype),
        )  # fmt: skip

    def item(self, blocks: Any, i: int, dtype: Any) -> Any:
        """One array of those in each block."""
        meta = np.empty((0,) * len(self.index), dtype)
        return da.blockwise(_item, self.index, blocks, self.index, i, None, dtype=dtype, meta=meta)

    def item_of_parameter(self, blocks: Any, i: int, name: str) -> Any:
        """What the blocks' samples and channels add to a weight's or bias's gradient, (N, C) or with ones."""
        if name not in self.arrays:
            return None
        _, index = self.arrays[name]
        adjust = {}
        for d in (0, self.axis):
            if d not in index:
                adjust[d] = (1,) * blocks.numblocks[d]
        meta = np.empty((0, 0))
        return da.blockwise(
            _item, (0, self.axis), blocks, self.index, i, None, dtype=np.float64, meta=meta,
            adjust_chunks=adjust, concatenate=False,
        )  # fmt: skip

    def gradient_of(self, name: str, given: Any, sums: Any) -> Any:
        """A weight's or bias's gradient, of its shape, dtype and chunks."""
        if given is None:
            return None
        given = _array(given)
        _, index = self.arrays[name]
        axes = tuple(i for i, d in enumerate((0, self.axis)) if d not in index)
        total = sums
        if axes:
            total = da.reduction(sums, _total, _total, axis=axes, dtype=np.float64, split_every=_FAN_IN, name="total")
        dtype = given.dtype.newbyteorder("=") if given.dtype.kind not in "iub" else np.dtype(np.float64)
        return total.reshape(given.shape).rechunk(getattr(given, "chunks", -1)).map_blocks(_rounded, dtype, dtype=dtype)


def _check(dy: Any, x: Any, num_groups: Any, arrays: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise what gn_fast's function for NumPy would. It looks at `sums` last of all, and computes nothing
    if they are none.
    """
    stand_ins = {name: _stand_in(name, value) for name, value in arrays.items()}
    try:
        gn_fast.group_norm_backward(
            _stand_in("dy", dy), _stand_in("x", x), num_groups, **stand_ins, **options, sums=False
        )  # type: ignore[call-overload]
    except TypeError as error:
        if not str(error).startswith("sums "):
            raise


def _stand_in(name: str, value: Any) -> Any:
    """Of a dask array's shape and dtype, in no memory."""
    if isinstance(value, Moments):
        return Moments._trusted(*(_stand_in(name, a) for a in (value.count, value.mean, value.m2)))
    if not isinstance(value, da.Array):
        return value
    if any(map(math.isnan, value.shape)):
        raise ValueError(
            f"{name} must have chunks of known sizes, not shape {value.shape}: {name}.compute_chunk_sizes() finds them"
        )
    if type(value._meta) is not np.ndarray:
        return value._meta
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)


def _array(value: Any) -> Any:
    """Of dask, without chunks of nothing, or of NumPy."""
    if not isinstance(value, da.Array):
        return np.asarray(value)
    return value.rechunk(tuple(tuple(filter(None, sizes)) or (0,) for sizes in value.chunks))


def _chunked(value: Any, chunks: tuple[Any, ...]) -> Any:
    """A dask array in these chunks, into which one of NumPy is cut at once: on the way dask may choose others."""
    return value.rechunk(chunks) if isinstance(value, da.Array) else da.from_array(np.asarray(value), chunks)


def _fields(statistics: Any) -> list[Any]:
    """Arrays of statistics' parts, of one that has them as elements."""
    parts = []
    for name, (dtype, _) in statistics.dtype.fields.items():
        field, meta = operator.itemgetter(name), np.empty((0, 0), dtype)
        parts.append(da.blockwise(field, (0, 1), statistics, (0, 1), token=name, dtype=dtype, meta=meta))
    return parts


def _whole_groups(chunks: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Chunks of channels, each bound that cuts a group of this size moved to the group's end."""
    if size == 0 or all(channels % size == 0 for channels in chunks):
        return chunks
    bounds = sorted({-(-int(end) // size) * size for end in np.cumsum(chunks)})
    return tuple(map(int, np.diff([0, *bounds])))


# ---- what a task does ------------------------------------------------------------------------------------


def _arguments(
    blocks: tuple[Block, ...], names: tuple[str, ...], size: int, num_groups: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Those of gn_fast's function for NumPy, x in C order.

    Bits follow from the order of memory of x, which a chunk may lose on its way to another worker or to disk:
    distributed makes C order of all that is not contiguous.
    """
    given: dict[str, Any] = dict(zip(names, blocks, strict=True))
    for name in given.keys() & {"moments", "sums"}:
        given[name] = _unpacked(given[name])
    given["x"] = x = given["x"] if _has_c_order(given["x"]) else np.ascontiguousarray(given["x"])
    channels = x.shape[options["axis"]]
    return given | options | {"num_groups": channels // size if size else num_groups}


def _has_c_order(a: Block) -> bool:
    steps = [abs(stride) for stride, size in zip(a.strides, a.shape, strict=True) if size > 1 and stride]
    return steps == sorted(steps, reverse=True)


def _in_order_of(x: Block, result: Block) -> Block:
    if _has_c_order(x):
        return result
    ordered = np.empty_like(x, result.dtype)
    ordered[...] = result
    return ordered


def _norm(*blocks: Block, **more: Any) -> Any:
    x, *_ = blocks
    return _in_order_of(x, gn_fast.group_norm(**_arguments(blocks, **more)))


def _moments(*blocks: Block, **more: Any) -> Block:
    given = _arguments(blocks, **more)
    del given["eps"], given["activation"]
    return _packed(gn_fast.group_moments(**given), given["x"].ndim, given["axis"])


def _sums(*blocks: Block, **more: Any) -> Block:
    given = _arguments(blocks, **more)
    return _packed(gn_fast.group_gradient_sums(**given), given["x"].ndim, given["axis"])


def _gradients(*blocks: Block, **more: Any) -> tuple[Any, ...]:
    """dx, the sums that dweight and dbias are made of, and dresidual if there is a residual."""
    x, *_ = blocks
    given = _arguments(blocks, **more)
    for name in given.keys() & {"weight", "bias"}:
        given[name] = given[name].astype(np.float64)  # so that its gradient is not rounded before it is whole
    dx, dweight, dbias, *dresidual = gn_fast.group_norm_backward(**given)
    dx, *dresidual = (_in_order_of(x, result) for result in (dx, *dresidual))
    return dx, _table(dweight), _table(dbias), *dresidual


def _table(sums: Any) -> Any:
    return None if sums is None else np.atleast_2d(sums)


def _item(block: Any, i: int) -> Any:
    while isinstance(block, list):  # of the one block of dimensions that go
        (block,) = block
    return block[i]


def _total(sums: Block, axis: Any, keepdims: bool) -> Any:
    with np.errstate(all="ignore"):  # infinities of both signs are NaN
        return sums.sum(axis=axis, keepdims=keepdims)


def _rounded(total: Block, dtype: Any) -> Any:
    with np.errstate(all="ignore"):  # beyond the largest float16 is infinity
        return total.astype(dtype)


def _itself(block: Block, axis: Any, keepdims: bool) -> Block:
    return block


def _packed_moments(*fields: Block) -> Block:
    return _packed(Moments._trusted(*fields), 2, 1)


def _packed(statistics: Statistics, ndim: int, axis: int) -> Block:
    """Statistics as one array of as many dimensions as x, those of positions of length 1."""
    dtype = _MOMENTS if isinstance(statistics, Moments) else _SUMS
    fields = [getattr(statistics, name) for name in dtype.names or ()]
    n, c = fields[0].shape
    block = np.empty([n if i == 0 else c if i == axis else 1 for i in range(ndim)], dtype)
    for name, values in zip(dtype.names or (), fields, strict=True):
        block[name] = values.reshape(block.shape)
    return block


def _unpacked(block: Block) -> Any:
    kind = Moments if block.dtype == _MOMENTS else GradientSums
    return kind(*(block[name] for name in block.dtype.names or ()))


def _merged(parts: Block, axis: tuple[int, ...], keepdims: bool) -> Block:
    """The statistics of neighbouring chunks merged into one, in order."""
    cells = np.moveaxis(parts, axis, range(len(axis)))
    cells = cells.reshape(math.prod(cells.shape[: len(axis)]), *cells.shape[len(axis) :])
    if not len(cells):
        return np.zeros(cells.shape[1:], parts.dtype)  # dask asks what type of array this makes
    first, *others = map(_unpacked, cells)
    whole = first.merge(*others)
    ndim, kept = (parts.ndim, [i for i in range(parts.ndim) if i not in axis]) if keepdims else (2, [0, 1])
    return _packed(whole, ndim, kept[1])

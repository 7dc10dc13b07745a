"""`gn-fast norm`: normalize a file into another, however large, in a bounded amount of memory.

An array is worked on in pieces that lie contiguous in its file. If a sample fits in the memory, pieces are of
whole samples. Otherwise a first sweep takes the moments of all pieces of a sample, which merge into the
sample's, and a second sweep normalizes the pieces with these. How files are read and written lives in npy.py.
"""

import argparse
import contextlib
import itertools
import math
import os
import re
import signal
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

import gn_fast
from gn_fast import Moments

from .npy import DAMAGED, Array, Header, Piece, Source, read_header, typed, whole_file, write_header
from .terminal import Advance, blamed, number_from_1, progress

MIB = 1 << 20
PIECE = 64 * MIB  # of samples or a tile: larger ones are no faster, and answer Ctrl-C later
PYTHON = 4 * MIB  # its heap and malloc's grow by 1 MiB at a time
THREAD = MIB  # a kernel's scratch has at most 350 KiB, and an allocator its own ways
GROUP = 160  # bytes of a group's moments, of their copies and of what merging them takes, as float64
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OPTIONS = {  # of what gn_fast calls an argument
    "x": "IN.npy",
    "num_groups": "--groups",
    "axis": "--axis",
    "weight": "--weights",
    "bias": "--weights",
    "eps": "--eps",
    "residual": "--residual",
    "activation": "--activation",
}
DESCRIPTION = """\
Normalize the array in IN.npy, of shape (N, C, ...), and write the result to OUT.npy, as np.save would.

Files may be larger than memory. OUT.npy appears whole, when all is written, or not at all; one that is there
is kept unless --force. If a sample (of an array in Fortran order: all of it) fits in the memory, the result
has the bits of gn_fast.group_norm; otherwise it is made of tiles, within the same bound of error."""
EXAMPLE = """\
example:
  gn-fast norm features.npy normalized.npy --groups 32 --activation silu --memory 256M"""


def add_command(commands: Any) -> None:
    """Add `norm` to the subparsers of the command line."""
    parser = commands.add_parser(
        "norm",
        help="normalize a file, which may be larger than memory",
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add(
        "input",
        type=Path,
        metavar="IN.npy",
        help="float16 to float64, integers or bools (which give float64)",
    )
    add(
        "output",
        type=Path,
        metavar="OUT.npy",
        help="where the result is to be; it may be IN.npy, with --force",
    )
    add("--groups", type=int, required=True, metavar="G", help="the number of groups, which divides C")
    add("--axis", type=int, default=1, help="the axis of the channels, any but 0; default: %(default)s")
    add(
        "--weights",
        type=Path,
        metavar="W.npz",
        help="with the arrays weight, bias or both, as np.savez has them",
    )
    add("--eps", type=float, default=1e-5, help="added to the variance; default: %(default)s")
    add("--residual", type=Path, metavar="R.npy", help="of the shape of IN.npy, added before the activation")
    add(
        "--activation",
        type=_activation,
        metavar="NAME",
        help="relu, leaky_relu, leaky_relu:SLOPE, silu, gelu, ...",
    )
    add(
        "--bfloat16",
        action="store_true",
        help="values of 2 bytes without a type are bfloat16, as NumPy saves it",
    )
    add("--memory", type=_bytes, default="1G", metavar="SIZE", help=(
        "what the work may take besides Python and NumPy, in bytes or with K, M or G; default: %(default)s"
    ))  # fmt: skip
    add("--threads", type=number_from_1, metavar="T", help="default: as gn-fast info tells")
    add("--force", action="store_true", help="replace OUT.npy if it is there")
    parser.set_defaults(run=partial(_run, parser))


def _activation(text: str) -> str | tuple[str, float]:
    name, colon, slope = text.partition(":")
    return (name, float(slope)) if colon else text


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size as 256M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    with contextlib.ExitStack() as files:
        if arguments.threads is not None:
            files.enter_context(gn_fast.num_threads(arguments.threads))
        work = _checked(parser, arguments, files)
        output = _checked_output(parser, arguments)
        header = work.x.header
        first = next(work.pieces(), None)
        sweeps = 1 if first is None or work.has_whole_groups(first) else 2
        try:
            with (
                _stopped_by_signals(),
                progress(arguments.input.name, sweeps * math.prod(header.shape)) as advance,
                whole_file(output, replace=arguments.force) as file,
            ):
                write_header(file, header.shape, header.order, work.x.dtype)
                _normalize(work, file, advance)
        except FileExistsError:
            parser.error(f"argument OUT.npy: {output} has come meanwhile: --force replaces it")


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let the first signal end the block as an exception, and no other disturb what is then put in order."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    caught = [each for each in SIGNALS if before[each] not in (signal.SIG_IGN, None)]  # nohup ignores

    def stop(number: int, _frame: object) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for each in caught:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in caught:
            signal.signal(each, before[each])


# ---- the work ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A call of `group_norm` whose arrays lie in files."""

    x: Source
    residual: Source | None
    weight: Array | None
    bias: Array | None
    num_groups: int
    axis: int
    eps: float
    activation: Any
    values: int  # that fit in the memory

    @property
    def group_size(self) -> int:
        """Channels of a group."""
        return self.x.header.shape[self.axis] // self.num_groups

    def pieces(self) -> Iterator[Piece]:
        """All of x in its file's order: ranges of the slowest axis of which one index fits in the memory."""
        shape = self.x.header.shape
        if math.prod(shape) == 0:
            return
        slowest_first = list(range(len(shape)))[:: 1 if self.x.header.order == "C" else -1]
        sizes = [math.prod(shape[d] for d in slowest_first[i + 1 :]) for i in range(len(shape))]
        level = next(i for i, size in enumerate(sizes) if size <= self.values)
        cut, size = slowest_first[level], sizes[level]
        run, block = max(1, min(self.values, PIECE // self.bytes_per_value) // size), shape[cut]
        if cut == self.axis and self.group_size * size <= self.values:
            run = max(run - run % self.group_size, self.group_size)
        elif cut == self.axis:
            block = self.group_size
        outer = slowest_first[:level]
        for i, indices in enumerate(np.ndindex(*(shape[d] for d in outer))):
            at = dict(zip(outer, indices, strict=True))
            index = [slice(at[d], at[d] + 1) if d in at else slice(0, shape[d]) for d in range(len(shape))]
            for begin in range(0, shape[cut], block):
                for start in range(begin, begin + block, run):
                    index[cut] = slice(start, min(start + run, begin + block))
                    yield Piece(tuple(index), (i * shape[cut] + start) * size)

    @property
    def bytes_per_value(self) -> int:
        """What a piece takes."""
        return self.x.bytes_per_value + (0 if self.residual is None else self.residual.bytes_per_value)

    def reserve(self, values: int) -> None:
        """Have memory for pieces of so many values."""
        self.x.reserve(values)
        if self.residual is not None:
            self.residual.reserve(values)

    def group_norm(self, piece: Piece, moments: Moments | None) -> Array:
        """The result of a piece, in the memory that x was read into."""
        order = self.x.header.order
        n, c = piece.index[0], piece.index[self.axis]
        x = self.x.read(piece, order)
        return gn_fast.group_norm(
            x,
            self.groups(piece),
            _part(self.weight, n, c),
            _part(self.bias, n, c),
            self.eps,
            axis=self.axis,
            residual=None if self.residual is None else self.residual.read(piece, order),
            activation=self.activation,
            moments=moments,
            out=x,
        )

    def group_moments(self, piece: Piece) -> Moments:
        """Of what a piece has of each group."""
        x = self.x.read(piece, self.x.header.order)
        return gn_fast.group_moments(x, self.groups(piece), axis=self.axis)

    def groups(self, piece: Piece) -> int:
        """The number of groups of which a piece has some or all."""
        return max(1, piece.shape[self.axis] // self.group_size)

    def groups_of(self, piece: Piece) -> slice:
        """These groups."""
        first = piece.index[self.axis].start // self.group_size
        return slice(first, first + self.groups(piece))

    def has_whole_groups(self, piece: Piece) -> bool:
        """Whether a piece, and so each of the others, has all that its statistics are of."""
        shape = self.x.header.shape
        positions = (d for d in range(1, len(shape)) if d != self.axis)
        return piece.shape[self.axis] % self.group_size == 0 and all(
            piece.shape[d] == shape[d] for d in positions
        )


def _part(parameter: Array | None, n: slice, c: slice) -> Array | None:
    """What a piece needs of a weight or bias that is a scalar or of the shape (1, C) or (N, C)."""
    if parameter is None or parameter.ndim == 0:
        return parameter
    return parameter[n if len(parameter) > 1 else slice(None), c]


def _normalize(work: Work, file: BufferedWriter, advance: Advance) -> None:
    """Write the results of all pieces, in their order."""
    by_sample = work.x.header.order == "C"  # whose pieces follow each other, and may still be in the cache
    for _, pieces in itertools.groupby(work.pieces(), lambda piece: by_sample and piece.index[0].start):
        parts = list(pieces)
        work.reserve(parts[0].size)  # no other is larger
        whole = None if work.has_whole_groups(parts[0]) else _merged(work, parts, advance)
        for piece in parts:
            moments = None if whole is None else _of_piece(whole, work, piece, parts[0])
            y = work.group_norm(piece, moments)
            file.write(work.x.memory[: y.nbytes].data)
            advance(piece.size)


def _merged(work: Work, parts: list[Piece], advance: Advance) -> Moments:
    """The moments of each sample and group, of all parts."""
    shape = (parts[-1].index[0].stop - parts[0].index[0].start, work.num_groups)
    whole = Moments(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))
    for piece in parts:
        before = _of_piece(whole, work, piece, parts[0])
        after = before.merge(work.group_moments(piece))
        before.count[...], before.mean[...], before.m2[...] = after.count, after.mean, after.m2
        advance(piece.size)
    return whole


def _of_piece(whole: Moments, work: Work, piece: Piece, first: Piece) -> Moments:
    """Views of the moments of a piece's samples and groups."""
    n = slice(piece.index[0].start - first.index[0].start, piece.index[0].stop - first.index[0].start)
    g = work.groups_of(piece)
    return Moments(whole.count[n, g], whole.mean[n, g], whole.m2[n, g])


# ---- the checks ----------------------------------------------------------------------------------


def _checked(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, files: contextlib.ExitStack
) -> Work:
    """The work, if all of it fits together."""
    with blamed(parser, f"IN.npy: {arguments.input}"):
        file, header = _opened(arguments.input, arguments.bfloat16, files)
        if len(header.shape) < 2:
            raise ValueError(f"the array must have at least 2 dimensions, its shape is {header.shape}")
    with blamed(parser, f"--weights: {arguments.weights}"):
        parameters = {} if arguments.weights is None else _parameters(arguments.weights, arguments.bfloat16)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    with blamed(parser, f"--residual: {arguments.residual}"):
        added = arguments.residual and _opened(arguments.residual, arguments.bfloat16, files)
        if added and added[1].shape != header.shape:
            raise ValueError(f"the shape must be that of IN.npy, {header.shape}, not {added[1].shape}")
    try:  # what gn_fast itself thinks of it, of an array without positions
        nothing = np.empty((0,) * len(header.shape), header.dtype)
        gn_fast.group_moments(nothing, 1, axis=arguments.axis)
        axis = arguments.axis % len(header.shape)
        shape = [d if i in (0, axis) else 0 for i, d in enumerate(header.shape)]
        shape = [*shape, 0] if len(shape) == 2 else shape
        dtype = gn_fast.group_norm(
            np.empty(shape, header.dtype),
            arguments.groups,
            weight,
            bias,
            arguments.eps,
            axis=axis,
            residual=np.empty(shape, added[1].dtype) if added else None,
            activation=arguments.activation,
        ).dtype
    except (TypeError, ValueError) as error:
        name = str(error).partition(" ")[0]
        parser.error(f"argument {OPTIONS.get(name, 'IN.npy')}: {error}")
    x = Source(file, header, dtype)
    residual = Source(*added, _computed(added[1].dtype)) if added else None
    channels = header.shape[axis]
    weight, bias = _rows(weight, channels), _rows(bias, channels)
    work = Work(x, residual, weight, bias, arguments.groups, axis, arguments.eps, arguments.activation, 0)
    with blamed(parser, "--memory"):
        return replace(work, values=_values(work, arguments.memory))


def _opened(path: Path, bfloat16: bool, files: contextlib.ExitStack) -> tuple[BufferedReader, Header]:
    _check_regular(path)
    file = files.enter_context(path.open("rb"))
    return file, read_header(file, bfloat16)


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):  # asked first: to open a pipe waits for who writes to it
        raise ValueError("it is no regular file")


def _parameters(path: Path, bfloat16: bool) -> dict[str, Array]:
    _check_regular(path)
    if not zipfile.is_zipfile(path):  # np.load would also read other files, and large ones
        raise ValueError("it is no archive as np.savez makes")
    try:
        with np.load(path, allow_pickle=False) as archive:
            unknown = sorted(set(archive) - {"weight", "bias"})
            if unknown or not archive:
                raise ValueError(
                    f"its arrays must be weight, bias or both, not {', '.join(unknown) or 'none'}"
                )
            parameters = dict(archive)
    except (EOFError, *DAMAGED, zipfile.BadZipFile, zlib.error):
        raise ValueError("the file is damaged") from None
    return {name: a.view(typed(a.dtype, bfloat16)) for name, a in parameters.items()}


def _rows(parameter: Array | None, channels: int) -> Array | None:
    """A weight or bias that fits as (1, C) or (N, C), if it is no scalar."""
    if parameter is None or parameter.ndim == 0:
        return parameter
    return parameter.reshape(parameter.size // channels if channels else 1, channels)


def _computed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What gn_fast makes of a dtype: native, and float64 of integers."""
    return np.dtype(np.float64) if dtype.kind in "biu" else dtype.newbyteorder("=")


def _values(work: Work, memory: int) -> int:
    """How many values a piece may have; ValueError if they are too few."""
    header = work.x.header
    n = max(1, header.shape[0])
    sample = math.prod(header.shape) // (n if header.order == "C" else 1) * work.bytes_per_value
    parameters = sum(a.nbytes for a in (work.weight, work.bias) if a is not None)
    taken = PYTHON + THREAD * gn_fast.get_num_threads() + parameters
    if taken + sample > memory:
        taken += GROUP * work.num_groups * (1 if header.order == "C" else n)
    least = taken + min(sample, MIB)
    if memory < least:
        raise ValueError(f"{memory} bytes are too few for these arrays: give {-(-least // MIB)}M or more")
    return max(1, (memory - taken) // work.bytes_per_value)


def _checked_output(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Path:
    with blamed(parser, f"OUT.npy: {arguments.output}"):
        output = Path(os.path.realpath(arguments.output))  # a link stays one
        if not output.parent.is_dir():
            raise ValueError(f"there is no folder {output.parent}")
        if not os.access(output.parent, os.W_OK):
            raise ValueError(f"nothing can be written to the folder {output.parent}")
        if output.exists() and not output.is_file():
            raise ValueError("it is no regular file")
        if output.exists() and not arguments.force:
            raise ValueError("the file is there: --force replaces it")
    return output

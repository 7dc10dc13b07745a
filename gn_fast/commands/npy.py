"""Files of arrays, a piece at a time: what `norm` reads and writes. What is done to a piece lives in norm.py.

Pieces are read and not mapped: what is mapped counts against a limit of address space, and a file that
another process cuts meanwhile is an error then, where a mapping would end the process.
"""

import contextlib
import math
import os
import secrets
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DAMAGED = (SyntaxError, tokenize.TokenError)  # what NumPy lets out of a damaged header


@dataclass(frozen=True)
class Piece:
    """Some of an array, contiguous in its file: a range of each axis, and where in the file the first is."""

    index: tuple[slice, ...]
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array has it."""
        return tuple(axis.stop - axis.start for axis in self.index)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a .npy file says of its array, and where the values begin."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype[Any]
    offset: int


def read_header(file: BufferedReader, bfloat16: bool) -> Header:
    """Read the header of an open file; one that is no whole .npy file raises ValueError."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read(file)
    except KeyError:
        raise ValueError(f"version {version} of the format is for arrays of structures") from None
    except DAMAGED:
        raise ValueError("the header of the file is damaged") from None
    if dtype.hasobject:
        raise ValueError("the file is of Python objects, not of numbers")
    dtype = typed(dtype, bfloat16)
    header = Header(shape, "F" if fortran_order else "C", dtype, file.tell())
    missing = header.offset + math.prod(shape) * dtype.itemsize - os.fstat(file.fileno()).st_size
    if missing > 0:
        raise ValueError(f"the file is cut off: {missing} bytes of its {shape} values of {dtype} are missing")
    return header


def typed(dtype: np.dtype[Any], bfloat16: bool) -> np.dtype[Any]:
    """The dtype of what a file has, which for bfloat16 says V2; if that may be anything, ValueError."""
    if dtype != np.dtype("V2"):
        return dtype
    if not bfloat16:
        raise ValueError(
            "the values are of 2 bytes and no type (V2): if NumPy saved bfloat16, give --bfloat16"
        )
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("bfloat16 needs ml_dtypes: pip install 'gn_fast[bfloat16]'") from None
    named: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return named


class Source:
    """An array in a file, of which pieces are read into memory that is used again for the next.

    They are of the `dtype` that gn_fast works on, native and not integer, and in the order of memory that the
    array which is normalized has in its file.
    """

    def __init__(self, file: BufferedReader, header: Header, dtype: np.dtype[Any]) -> None:
        self.file, self.header, self.dtype = file, header, dtype
        self.memory = self.raw = np.empty(0, np.uint8)

    @property
    def converted(self) -> bool:
        """Whether values are read into other memory than they are used in."""
        return self.header.dtype != self.dtype

    @property
    def bytes_per_value(self) -> int:
        """What is kept in memory."""
        return self.dtype.itemsize + (self.header.dtype.itemsize if self.converted else 0)

    def reserve(self, values: int) -> None:
        """Have memory for pieces of at most so many values; what there is, if it is enough."""
        if self.memory.nbytes < values * self.dtype.itemsize:
            self.memory = np.empty(values * self.dtype.itemsize, np.uint8)
            self.raw = (
                np.empty(values * self.header.dtype.itemsize, np.uint8) if self.converted else self.memory
            )

    def read(self, piece: Piece, order: Literal["C", "F"]) -> Array:
        """The values of a piece, until the next is read."""
        values = _view(self.memory, self.dtype, piece, order)
        if order != self.header.order:  # they lie scattered in the file: those are mapped
            mapped = np.memmap(
                self.file, self.header.dtype, "r", self.header.offset, self.header.shape, self.header.order
            )
            np.copyto(values, mapped[piece.index], casting="unsafe")
            return values
        raw = _view(self.raw, self.header.dtype, piece, order)
        self.file.seek(self.header.offset + piece.first * self.header.dtype.itemsize)
        wanted = self.raw[: raw.nbytes]
        if self.file.readinto(wanted.data) != raw.nbytes:
            raise OSError(f"{self.file.name} has become shorter while it was read")
        if self.converted:
            np.copyto(values, raw, casting="unsafe")
        return values


def _view(memory: NDArray[np.uint8], dtype: np.dtype[Any], piece: Piece, order: Literal["C", "F"]) -> Array:
    used = memory[: piece.size * dtype.itemsize]
    return used.view(dtype).reshape(piece.shape, order=order)


def write_header(
    file: BufferedWriter, shape: tuple[int, ...], order: Literal["C", "F"], dtype: np.dtype[Any]
) -> None:
    """Write what `np.save` would."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": order == "F", "shape": shape}
    )


@contextlib.contextmanager
def whole_file(path: Path, replace: bool) -> Iterator[BufferedWriter]:
    """A file that appears at `path` when the block has ended, and not at all if it raises.

    Until then it is a temporary one of the same folder. One that is there is replaced, or FileExistsError is
    raised at the end, also if it has come meanwhile.
    """
    temporary = path.with_name(f".gn-fast-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename it never replaces
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError from None
        temporary.rename(path)

"""`gn-fast demo`: what group normalization does to an array, the classic mistake, and the times.

It only uses the public functions; serious measurements live with the benchmarks.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gn_fast
from gn_fast import reference

from .npy import DAMAGED
from .terminal import blamed

Array = NDArray[Any]

EPS = 1e-5
SECONDS_OF_TIMING = 1.0


def add_command(commands: Any) -> None:
    """Add `demo` to the subparsers of the command line."""
    parser = commands.add_parser(
        "demo",
        help="normalize an array, check the result and time it",
        description="Show what group normalization does to an array, the classic mistake, and the times.",
        epilog="example:\n  gn-fast demo --input features.npy --groups 8",
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE.npy",
        help="array of shape (N, C, ...); by default uniform random numbers, (64, 16, 112, 112)",
    )
    parser.add_argument("--groups", type=int, default=4, metavar="G", help="default: %(default)s")
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    groups = arguments.groups
    with blamed(parser, f"--input: {arguments.input}"):
        x = _example() if arguments.input is None else _load(arguments.input)
    if groups < 1 or x.shape[1] % groups:
        parser.error(f"argument --groups: {groups} does not divide the {x.shape[1]} channels")

    with np.errstate(all="ignore"):  # an infinity in the data is no news
        _show(x, groups)


def _show(x: Array, groups: int) -> None:
    y = gn_fast.group_norm(x, groups, eps=EPS)
    rootless = _without_root(x, groups)
    exact = reference.group_norm(x.astype(np.float64), groups, eps=EPS)
    print(f"Group normalization of {x.shape[1]} channels in {groups} groups, eps={EPS}\n")
    _print_statistics({"x": x, "gn_fast.group_norm(x)": y, "without the root": rootless})
    print(
        "\nThe last row divides by (var + eps) and not by its square root, an easy mistake:"
        f"\nits standard deviation is {_std(rootless):.2f} where it should be {_std(y):.2f}."
        f"\n\nLargest difference from the float64 reference: {_difference(y, exact):.2g}\n"
    )
    _print_times(_contenders(x, groups), exact)


def _example() -> Array:
    # Uniform on [0, 1): var = 1/12, so that std / var = sqrt(12) = 3.46.
    return np.random.default_rng(0).random((64, 16, 112, 112), dtype=np.float32)


def _load(path: Path) -> Array:
    # Not np.load, which would also open archives and offers to unpickle anything else.
    with path.open("rb") as file:
        try:
            x: Array = np.lib.format.read_array(file, allow_pickle=False)
        except DAMAGED:
            raise ValueError("the header of the file is damaged") from None
    if x.dtype.kind not in "biuf" or (x.dtype.kind == "f" and x.dtype.itemsize > 8):
        raise ValueError(f"the dtype must be a real one of at most 64 bits, it is {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"the array must have at least 2 dimensions, its shape is {x.shape}")
    if x.size == 0:
        raise ValueError(f"the array must not be empty, its shape is {x.shape}")
    return x


# ---- what is shown -------------------------------------------------------------------------------


def _print_statistics(arrays: dict[str, Array]) -> None:
    print(f"{'':22} {'type':8} {'shape':18} {'mean':>11} {'std':>11} {'min':>11} {'max':>11}")
    for name, a in arrays.items():
        shape = str(a.shape).replace(" ", "")
        numbers = (a.mean(dtype=np.float64), _std(a), float(a.min()), float(a.max()))
        print(f"{name:22} {a.dtype!s:8} {shape:18}", *(f"{number:11.5g}" for number in numbers))


def _print_times(contenders: dict[str, Callable[[], Array]], exact: Array) -> None:
    # The first call of each is its check; the rounds interleave, so that all see the same machine.
    differences = {name: _difference(call(), exact) for name, call in contenders.items()}
    best = dict.fromkeys(contenders, float("inf"))
    deadline = time.perf_counter() + SECONDS_OF_TIMING
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:
        rounds += 1
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    ours = next(iter(best.values()))
    print(f"{'':22} {'best time':>12} {'ratio':>8} {'largest difference':>20}")
    for name, seconds in best.items():
        print(f"{name:22} {seconds * 1e3:9.3f} ms {seconds / ours:8.2f} {differences[name]:20.2g}")


def _contenders(x: Array, groups: int) -> dict[str, Callable[[], Array]]:
    out = gn_fast.group_norm(x, groups, eps=EPS)
    contenders: dict[str, Callable[[], Array]] = {
        "gn_fast, out= reused": lambda: gn_fast.group_norm(x, groups, eps=EPS, out=out),
        "gn_fast, fresh result": lambda: gn_fast.group_norm(x, groups, eps=EPS),
        "plain NumPy": lambda: _plain(x, groups),
    }
    try:
        import torch
    except ImportError:
        return contenders
    tensor = torch.from_numpy(x.astype(out.dtype))
    group_norm = torch.nn.functional.group_norm
    contenders["PyTorch"] = lambda: group_norm(tensor, groups, eps=EPS).numpy()
    return contenders


# ---- what is compared ----------------------------------------------------------------------------


def _plain(x: Array, groups: int) -> Array:
    """Group normalization as one writes it in NumPy."""
    slabs = x.reshape(x.shape[0], groups, -1)
    mean = slabs.mean(axis=-1, keepdims=True)
    var = slabs.var(axis=-1, keepdims=True)
    y: Array = (slabs - mean) / np.sqrt(var + EPS)
    return y.reshape(x.shape)


def _without_root(x: Array, groups: int) -> Array:
    slabs = x.reshape(x.shape[0], groups, -1)
    mean = slabs.mean(axis=-1, keepdims=True)
    var = slabs.var(axis=-1, keepdims=True)
    y: Array = (slabs - mean) / (var + EPS)
    return y.reshape(x.shape)


def _std(a: Array) -> float:
    return float(a.std(dtype=np.float64))


def _difference(y: Array, exact: Array) -> float:
    same = (y == exact) | (np.isnan(y) & np.isnan(exact))
    return float(np.where(same, 0.0, np.abs(y - exact)).max())

"""`gn-fast bench`: a minute's race of gn_fast and what is installed beside it.

Each result is compared with the reference before it is timed. Serious measurements live with the benchmarks.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gn_fast
from gn_fast import reference

from .terminal import blamed, number_from_1, print_table, progress

Array = NDArray[Any]
Call = Callable[[], Any]

EPS = float(np.float32(1e-5))  # as ONNX keeps it
OURS = "gn_fast"
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "ResNet-50, first stage": ((4, 256, 56, 56), 32),
    "ResNet-50, last stage": ((32, 2048, 7, 7), 32),
    "Stable Diffusion, U-Net": ((2, 320, 64, 64), 32),
    "Stable Diffusion, decoder": ((1, 256, 128, 128), 32),
    "3-D U-Net": ((1, 32, 64, 64, 64), 8),
    "wav2vec 2.0, first layer": ((1, 512, 16000), 512),
    "transformer's tokens": ((4096, 768), 1),
    "a small call": ((1, 32, 8, 8), 8),
}
DESCRIPTION = """\
Time gn_fast beside plain NumPy and, where they are installed, PyTorch, JAX and ONNX Runtime: the forward pass
in float32 with weight and bias, each call with a new result, which is checked first. They take turns, and the
best time of each counts."""
EXAMPLE = "example:\n  gn-fast bench --shape 2,320,64,64 --groups 32 --plot speed.png"


def add_command(commands: Any) -> None:
    """Add `bench` to the subparsers of the command line."""
    parser = commands.add_parser(
        "bench",
        help="time gn_fast beside what is installed",
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("--shape", type=_shape, metavar="N,C,...", help="of one array; default: those of some models")
    add("--groups", type=number_from_1, metavar="G", help="the number of groups, for --shape")
    add("--seconds", type=_seconds, default=60.0, metavar="S", help="of all timing; default: %(default)g")
    add("--threads", type=number_from_1, metavar="T", help="default: as gn-fast info tells")
    add("--json", action="store_true", help="seconds as JSON instead of the table")
    add("--plot", type=Path, metavar="FILE", help="draw the table too: png, svg, pdf; needs matplotlib")
    parser.set_defaults(run=partial(_run, parser))


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(map(number_from_1, text.split(",")))
    if len(shape) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has less than 2 dimensions")
    return shape


def _seconds(text: str) -> float:
    if not 0 < (seconds := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0")
    return seconds


@dataclass
class Result:
    """What a race on a shape has found: seconds of each, or why one did not finish."""

    name: str
    shape: tuple[int, ...]
    groups: int
    seconds: dict[str, float]
    failed: dict[str, str]


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if (arguments.shape is None) != (arguments.groups is None):
        parser.error("arguments --shape and --groups: give both or none")
    shapes = SHAPES
    if arguments.shape is not None:
        with blamed(parser, "--groups"):
            gn_fast.group_norm(np.empty((0, arguments.shape[1])), arguments.groups)
        shapes = {"given": (arguments.shape, arguments.groups)}
    if arguments.plot is not None:
        with blamed(parser, "--plot"):
            _check_plot(arguments.plot)
    results = []
    with gn_fast.num_threads(arguments.threads or gn_fast.get_num_threads()):
        with progress("bench", len(shapes)) as advance:
            for name, (shape, groups) in shapes.items():
                results.append(_race(name, shape, groups, arguments.seconds / len(shapes)))
                advance(1)
        if arguments.json:
            print(json.dumps([vars(result) for result in results], indent=2))
        else:
            _print(results)
    if arguments.plot is not None:
        _plot(results, arguments.plot)


# ---- the race -------------------------------------------------------------------------------------------


def _race(name: str, shape: tuple[int, ...], groups: int, seconds: float) -> Result:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32) + np.float32(0.5)
    weight, bias = rng.uniform(0.5, 1.5, (2, shape[1])).astype(np.float32)
    exact = reference.group_norm(x[:1], groups, weight, bias, EPS)
    ours = gn_fast.group_norm(x, groups, weight, bias, EPS)
    # 8 roundings and a random walk of one for each value summed, of numbers that contain the mean.
    roundings = 1.5 * (8 + math.sqrt(math.prod(shape[1:]) / groups))
    bound = roundings * float(np.finfo(np.float32).eps) * float(np.abs(exact).max())
    result = Result(name, shape, groups, {}, {})
    calls: dict[str, Call] = {}
    for contender, enter in CONTENDERS.items():
        try:
            call = enter(x, groups, weight, bias)
            y = np.asarray(call())
            off = float(max(np.abs(y[:1] - exact).max(), np.abs(y - ours).max()))
            if off > bound:
                raise ArithmeticError(f"the result is off by {off:.2g}, which is more than {bound:.2g}")
            calls[contender] = call
        except ImportError:
            continue
        except Exception as error:  # whatever another library raises
            if contender == OURS:
                raise
            result.failed[contender] = f"{type(error).__name__}: {error}".splitlines()[0]
    result.seconds = _best_times(calls, seconds)
    return result


def _best_times(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    best = dict.fromkeys(calls, math.inf)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 or time.perf_counter() < deadline:
        rounds += 1
        for name, call in calls.items():
            time.sleep(0.005)  # another library's idle threads spin for some milliseconds
            end = time.perf_counter() + 0.02
            while (start := time.perf_counter()) < end:
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


# ---- who takes part: each gives a call, or raises ImportError -------------------------------------------


def _gn_fast(x: Array, groups: int, weight: Array, bias: Array) -> Call:
    return partial(gn_fast.group_norm, x, groups, weight, bias, EPS)


def _plain(xp: Any, groups: int, x: Any, weight: Any, bias: Any) -> Any:
    """The formula as one writes it, for NumPy and JAX."""
    slabs = x.reshape(len(x), groups, -1)
    centred = slabs - slabs.mean(-1, keepdims=True)
    rstd = 1 / xp.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)
    per_channel = (-1, *(1,) * (x.ndim - 2))
    return (centred * rstd).reshape(x.shape) * weight.reshape(per_channel) + bias.reshape(per_channel)


def _numpy(x: Array, groups: int, weight: Array, bias: Array) -> Call:
    return partial(_plain, np, groups, x, weight, bias)


def _torch(x: Array, groups: int, weight: Array, bias: Array) -> Call:
    import torch

    torch.set_num_threads(gn_fast.get_num_threads())
    tensors = [torch.from_numpy(a) for a in (x, weight, bias)]
    return partial(torch.nn.functional.group_norm, tensors[0], groups, tensors[1], tensors[2], EPS)


def _jax(x: Array, groups: int, weight: Array, bias: Array) -> Call:
    import jax

    compiled = jax.jit(partial(_plain, jax.numpy, groups))
    arrays = [jax.numpy.asarray(a) for a in (x, weight, bias)]
    return lambda: compiled(*arrays).block_until_ready()


def _onnxruntime(x: Array, groups: int, weight: Array, bias: Array) -> Call:
    import onnx
    import onnxruntime

    arrays = {"x": x, "weight": weight, "bias": bias}
    node = onnx.helper.make_node("GroupNormalization", [*arrays], ["y"], num_groups=groups, epsilon=EPS)
    describe = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph(
        [node],
        "group_norm",
        [describe(name, shape=a.shape) for name, a in arrays.items()],
        [describe("y", shape=x.shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = gn_fast.get_num_threads()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, arrays)[0]


CONTENDERS: dict[str, Callable[[Array, int, Array, Array], Call]] = {
    OURS: _gn_fast,
    "NumPy": _numpy,
    "PyTorch": _torch,
    "JAX": _jax,
    "ONNX Runtime": _onnxruntime,
}


# ---- what is shown --------------------------------------------------------------------------------------


def _others(results: list[Result]) -> list[str]:
    return [n for n in CONTENDERS if n != OURS and any(n in r.seconds or n in r.failed for r in results)]


def _ratio(result: Result, name: str) -> float:
    """How many times as long as ours another's call takes; NaN if it has no time."""
    return result.seconds.get(name, math.nan) / result.seconds[OURS]


def _print(results: list[Result]) -> None:
    others = _others(results)
    threads = gn_fast.get_num_threads()
    title = f"gn_fast {gn_fast.__version__}, {threads} thread{'s' * (threads > 1)}; others: time / gn_fast's"
    rows = []
    for r in results:
        ratios = (f"{_ratio(r, n):.2f}" if n in r.seconds else "-" for n in others)
        rows.append(
            [r.name, "x".join(map(str, r.shape)), str(r.groups), f"{r.seconds[OURS] * 1e3:.3f} ms", *ratios]
        )
    print_table(title, ["model", "shape", "groups", OURS, *others], rows)
    for r in results:
        for name, reason in r.failed.items():
            print(f"{r.name}: {name} did not take part: {reason}")


def _check_plot(path: Path) -> None:
    """Raise now what drawing would raise after a minute."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install 'gn_fast[cli]'") from None
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"{path} must end in one of {', '.join(kinds)}")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{path} is no place for a file")


def _plot(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    others = _others(results)
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(results) * max(1, len(others))), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(others))
    places = np.arange(len(results))
    for i, name in enumerate(others):
        axes.barh(places + i * width, [_ratio(r, name) for r in results], width, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places + width * (len(others) - 1) / 2, [f"{r.name}\n{r.shape}" for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("time of a call / gn_fast's")
    axes.legend()
    figure.savefig(path)

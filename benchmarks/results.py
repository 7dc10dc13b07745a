"""What was measured, and what is said about it: ratios of minima, their geometric means, the worst."""

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import geometric_mean
from typing import Any

import cpuinfo

import gn_fast

from .cases import Case, Mode
from .contenders import AS_IT_COMES, CONTENDERS, COPY, FRESH, LIMIT, OURS, PEERS, TUNED, UNTUNED, enter
from .problem import Problem
from .timing import race, spread, turn
from .worker import Worker, tune_malloc


@dataclass
class Result:
    """The race of one case in one mode: the seconds of each contender's rounds."""

    case: Case
    mode: Mode
    seconds: dict[str, list[float]]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return FRESH if self.mode.fresh and FRESH in self.seconds else OURS

    def ratio(self, name: str, other: str) -> float | None:
        """One's time over another's, if both took part."""
        if name not in self.seconds or other not in self.seconds:
            return None
        return min(self.seconds[name]) / min(self.seconds[other])

    def spread(self, *names: str) -> float:
        """The largest one of these contenders."""
        return max(spread(self.seconds[name]) for name in names)


def measure(
    problems: Iterable[tuple[Case, Mode]], rounds: int, names: Sequence[str] = tuple(CONTENDERS)
) -> Iterator[Result]:
    """Check, then time, everyone who takes part: here, with a tuned allocator, or in a worker without."""
    tune_malloc()
    there = [name for name in names if name in UNTUNED]
    here = [name for name in names if name not in UNTUNED]
    with Worker() as worker:
        for case, mode in problems:
            calls, absent = enter(Problem(case, mode), here)
            turns = {name: partial(turn, call) for name, call in calls.items()}
            if there:
                taking_part, reasons, _ = worker.enter(case, mode, there)
                turns |= {name: partial(worker.turn, name) for name in taking_part}
                absent |= reasons
            yield Result(case, mode, race(turns, rounds), absent)


# ---- what is said ----------------------------------------------------------------------------------------


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(results: list[Result]) -> str:
    """The cases of one mode as a Markdown table."""
    peers = [name for name in PEERS if any(name in result.seconds for result in results)]
    over = [f"{OURS} / {name}" for name in (COPY, LIMIT)]
    rows = [
        ["case", "shape", "groups", *over, "spread", *(f"{name} / {OURS}" for name in peers)],
        ["---", "---", *["---:"] * (4 + len(peers))],
    ]
    for result in results:
        rows.append(
            [
                result.case.model,
                " x ".join(map(str, result.case.shape)),
                str(result.case.num_groups),
                *(_number(result.ratio(result.ours, name)) for name in (COPY, LIMIT)),
                f"{result.spread(result.ours, COPY):.2f}",
                *(_number(result.ratio(name, result.ours)) for name in peers),
            ]
        )
    return markdown(rows)


SHOWN = ("resnet-first", "mask-rcnn", "unet-outer", "vae-512", "unet-3d", "ddpm-8", "wav2vec2", "layer-norm")


def brief(results: list[Result]) -> str:
    """How many times as long as gn_fast the others take, for some cases, and for all in the mean."""
    names = [LIMIT, *(name for name in PEERS if any(name in result.seconds for result in results))]
    rows = [["time / gn_fast's", "shape", *names], ["---", "---", *["---:"] * len(names)]]
    for result in results:
        if result.case.name in SHOWN:
            shape = " x ".join(map(str, result.case.shape))
            rows.append([result.case.model, shape, *(_number(result.ratio(n, result.ours)) for n in names)])
    means = (geometric_mean([r.ratio(n, r.ours) for r in results if n in r.seconds]) for n in names)
    rows.append([f"geometric mean of {len(results)} shapes", "", *map(_number, means)])
    return markdown(rows)


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def summary(results: list[Result]) -> str:
    """Geometric means and worst cases of one mode, and who is missing."""
    less = " (less is better)"
    lines = [
        _line(f"{OURS} / {COPY}{less}", results, lambda r: r.ratio(r.ours, COPY), max),
        _line(f"{OURS} / {LIMIT}{less}", results, lambda r: r.ratio(r.ours, LIMIT), max),
        _line(f"fresh / out={less}", results, lambda r: r.ratio(FRESH, OURS), max),
        *(
            _line(f"{name} / {OURS}", results, lambda r, name=name: r.ratio(name, r.ours), min)
            for name in PEERS
        ),
        _line(f"page faults: {AS_IT_COMES} / {TUNED}", results, lambda r: r.ratio(AS_IT_COMES, TUNED), max),
        _line(f"fastest peer but {AS_IT_COMES} / {OURS}", results, fastest_peer, min),
    ]
    for name in (LIMIT, *PEERS):
        reasons = {result.case.name: result.absent[name] for result in results if name in result.absent}
        for reason in sorted(set(reasons.values())):
            cases = [case for case in reasons if reasons[case] == reason]
            where = "" if len(cases) == len(results) else f" ({', '.join(cases)})"
            lines.append(f"- without {name}{where}: {reason}")
    return "\n".join(filter(None, lines))


def fastest_peer(result: Result) -> float | None:
    ratios = [result.ratio(name, result.ours) for name in PEERS if name != AS_IT_COMES]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _line(
    what: str,
    results: list[Result],
    ratio: Callable[[Result], float | None],
    worst: Callable[[Iterable[tuple[float, str]]], tuple[float, str]],
) -> str:
    """The geometric mean and the worst of the cases that have this ratio, or nothing."""
    found = [(value, result.case.name) for result in results if (value := ratio(result)) is not None]
    if not found:
        return ""
    mean = geometric_mean([value for value, _ in found])
    return "- {}: geometric mean {:.2f}, worst {:.2f} ({})".format(what, mean, *worst(found))


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "jax", "onnxruntime"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    config = gn_fast.show_config("dicts")
    return {
        "processor": cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg(),  # others' work and the last minutes of this
        **config,
        "versions": config["versions"] | versions,
    }


def describe(where: dict[str, Any]) -> str:
    """The machine in one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    threads = where["threads"]["used"]
    return (
        f"{where['processor']}, {where['isa']['used']}, {threads} thread{'s' * (threads > 1)}, "
        f"{where['caches']['last level'] >> 20} MiB of last level cache; {versions}."
    )

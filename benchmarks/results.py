"""What was measured, and what is said about it: ratios of minima, their geometric means, the worst."""

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import geometric_mean
from typing import Any

import cpuinfo

import gn_fast

from .cases import Case, Mode
from .contenders import CONTENDERS, FRESH, LIMITS, OURS, PEERS, enter
from .problem import Problem
from .timing import race, spread, turn


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

    @property
    def peers(self) -> list[str]:
        return [name for name in PEERS if name in self.seconds]

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    @property
    def limit(self) -> str:
        """The best of the copies."""
        return min((name for name in LIMITS if name in self.seconds), key=self.best)

    def over_limit(self) -> float:
        """Ours over the limit: 1 is as fast as a copy."""
        return self.best(self.ours) / self.best(self.limit)

    def over_ours(self, name: str) -> float:
        """Another's time over ours: how many times faster we are."""
        return self.best(name) / self.best(self.ours)

    def share(self, name: str) -> float:
        """Speed as a share of the limit."""
        return self.best(self.limit) / self.best(name)

    def spread(self, *names: str) -> float:
        """The larger one of these contenders."""
        return max(spread(self.seconds[name]) for name in names)


def measure(case: Case, mode: Mode, rounds: int, names: tuple[str, ...] = tuple(CONTENDERS)) -> Result:
    """Check, then time, everyone who takes part."""
    calls, absent = enter(Problem(case, mode), names)
    turns = {name: lambda call=call: turn(call) for name, call in calls.items()}
    return Result(case, mode, race(turns, rounds), absent)


# ---- what is said ----------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """The cases of one mode as a Markdown table."""
    peers = [name for name in PEERS if any(name in result.seconds for result in results)]
    rows = [
        ["case", "shape", "groups", "gn_fast / copy", "spread", *(f"{name} / gn_fast" for name in peers)],
        ["---", "---", *["---:"] * (3 + len(peers))],
    ]
    for result in results:
        rows.append(
            [
                result.case.model,
                " x ".join(map(str, result.case.shape)),
                str(result.case.num_groups),
                f"{result.over_limit():.2f}",
                f"{result.spread(result.ours, result.limit):.2f}",
                *(f"{result.over_ours(name):.1f}" if name in result.seconds else "" for name in peers),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary(results: list[Result]) -> str:
    """Geometric means and worst cases of one mode, and who is missing."""
    ratios = {"gn_fast / copy (less is better)": [(r.over_limit(), r.case.name) for r in results]}
    if FRESH in results[0].seconds:
        ratios["fresh / out= (less is better)"] = [(1 / r.over_ours(OURS), r.case.name) for r in results]
    for name in PEERS:
        found = [(r.over_ours(name), r.case.name) for r in results if name in r.seconds]
        if found:
            ratios[f"{name} / gn_fast"] = found
    fastest = [(min(map(r.over_ours, r.peers)), r.case.name) for r in results if r.peers]
    if fastest:
        ratios["fastest peer / gn_fast"] = fastest
    lines = []
    for what, values in ratios.items():
        worst, case = max(values) if "less" in what else min(values)
        mean = geometric_mean([value for value, _ in values])
        lines.append(f"- {what}: geometric mean {mean:.2f}, worst {worst:.2f} ({case})")
    for name in PEERS:
        reasons = {result.case.name: result.absent[name] for result in results if name in result.absent}
        for reason in sorted(set(reasons.values())):
            cases = [case for case in reasons if reasons[case] == reason]
            where = "" if len(cases) == len(results) else f" ({', '.join(cases)})"
            lines.append(f"- without {name}{where}: {reason}")
    return "\n".join(lines)


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

"""`python -m benchmarks.report`: the whole suite, as JSON, Markdown and a plot, and into the README.

A full run writes to benchmarks/results; one of some cases or modes only where `--output` says. `--render`
measures nothing and writes again what a run has measured. `--compare REV` races another revision of gn_fast
instead, `--against PEER` one other library; neither writes anything.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tqdm import tqdm

from .cases import CASES, MODES, Case, Mode, add_choice
from .compare import HERE, compare
from .contenders import AS_IT_COMES, COPY, OURS, PEERS
from .plot import draw
from .results import Result, brief, describe, machine, measure, summary, table
from .timing import spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DRAWN = ("out", "backward")
QUIET = 1.25  # a spread above it says that the machine was busy with something else

HOW = """\
Each row is a race of interleaved rounds. Ratios are of minima. The spread is the third quartile of the times
over their minimum, the larger one of gn_fast's and the copy's. Every result was checked before it was timed.
gn_fast writes to a reused `out=` unless the title says otherwise; the others return new arrays.

*Copy* is the same bytes moved by as many threads without any arithmetic, with plain or with non-temporal
stores, whichever is faster: x is read and y is written; where a slab is larger than a core's level 2 cache, x
is read twice. Backward, x and dy are read and dx is written. *Practical limit* is the two sweeps, sums then
apply, in C without any care for accuracy, bits, options or strides, in the fastest of several ways.

*PyTorch (tuned)* keeps the memory of its results for the next ones, as all other contenders may in its
process: there `mallopt` set glibc's M_MMAP_MAX to 0, M_TRIM_THRESHOLD to 2 GiB and M_TOP_PAD to 64 MiB.
*PyTorch (as it comes)*, in a process of its own, has large results mapped anew at every call; what it takes
longer are page faults, not kernels, so whatever is claimed is claimed of the tuned one. Fresh results of
gn_fast are also made in that process, without the tuning.
"""


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.split("\n")[0])
    add_choice(parser, "--cases", CASES)
    add_choice(parser, "--modes", MODES)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where a full run writes to benchmarks/results"
    )
    parser.add_argument("--readme", action="store_true", help="put plot and table into README.md")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing: write that run again")
    parser.add_argument("--compare", metavar="REV", help="race another revision instead")
    peers = {peer.__name__: name for name, peer in PEERS.items() if name != AS_IT_COMES}
    parser.add_argument("--against", choices=peers, help="race it alone; exit with 1 if it ever is faster")
    options = parser.parse_args()
    problems = [(case, mode) for mode in options.modes for case in options.cases if mode.suits(case)]
    folder = options.output
    if folder is None and (options.cases, options.modes) == (list(CASES), list(MODES)):
        folder = RESULTS
    if options.render:
        folder = options.output or options.render.parent
    if options.readme and (folder is None or MODES[0] not in options.modes):
        parser.error(f"--readme needs --output and the mode {MODES[0]}, or a full run")

    if options.compare:
        print_comparison(options.compare, problems, options.rounds)
    elif options.against:
        peer = peers[options.against]
        results = measure(progress(problems), options.rounds, (OURS, peer))
        sys.exit(not all([print_duel(result, peer) for result in results]))
    else:
        if options.render:
            where, results = load(options.render)
        else:
            results = list(measure(progress(problems), options.rounds))
            where = machine()  # and the load of these minutes
        report(where, results, folder, options.readme)


def progress(problems: list[tuple[Case, Mode]]) -> Iterator[tuple[Case, Mode]]:
    """The problems, with a bar."""
    bar = tqdm(problems)
    for case, mode in bar:
        bar.set_description(f"{mode}: {case}")
        yield case, mode


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What a run wrote: the machine and the results, whose cases and modes have the titles of today."""
    record = json.loads(path.read_text())
    cases, modes = ({item.name: item for item in known} for known in (CASES, MODES))
    return record["machine"], [
        Result(cases[each["case"]["name"]], modes[each["mode"]["name"]], each["seconds"], each["absent"])
        for each in record["results"]
    ]


def report(where: dict[str, Any], results: list[Result], folder: Path | None, readme: bool) -> None:
    """Print the results, write them to a folder, and into the README."""
    panels = {mode.name: list(group) for mode, group in groupby(results, lambda result: result.mode)}
    sections = [
        f"## {panel[0].mode.title}\n\n{table(panel)}\n\n{summary(panel)}" for panel in panels.values()
    ]
    text = "\n\n".join(["# The speed of gn_fast", describe(where), HOW.strip(), *sections]) + "\n"
    print(text)
    noisy = sum(result.spread(result.ours, COPY) > QUIET for result in results)
    if noisy:
        print(f"noise: in {noisy} of {len(results)} races the spread is above {QUIET}", file=sys.stderr)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": where, "results": [asdict(result) for result in results]}
    (folder / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "speed.md").write_text(text)
    draw([panels[name] for name in DRAWN if name in panels] or list(panels.values())[:1], folder / "speed")
    if readme:
        place = Path(os.path.relpath(folder, ROOT)).as_posix()
        insert(
            ROOT / "README.md",
            "speed",
            f"![Speed as a share of a copy, for each case]({place}/speed.png)\n\n"
            f"{brief(panels[MODES[0].name])}\n\n{describe(where)} "
            f"All shapes, the other modes and how it was measured: [{place}/speed.md]({place}/speed.md).\n",
        )


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between a page's markers of this name."""
    markers = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = path.read_text().partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not end:
        raise SystemExit(f"{path} has no lines {' and '.join(markers)}")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def print_duel(result: Result, peer: str) -> bool:
    """Say how a race against one peer went; whether gn_fast was not slower."""
    title = f"{result.mode}, {result.case} {result.case.shape}/{result.case.num_groups}"
    if peer in result.absent:
        raise SystemExit(f"{title}: no {peer}: {result.absent[peer]}")
    ratio = result.ratio(peer, OURS)
    print(f"{title}: {peer} / gn_fast = {ratio:.2f} (spread {result.spread(OURS, peer):.2f})")
    return ratio >= 1


def print_comparison(revision: str, problems: list[tuple[Case, Mode]], rounds: int) -> None:
    """Print how much faster this tree is than another revision."""
    ratios = []
    for (case, mode), seconds in zip(progress(problems), compare(revision, problems, rounds), strict=True):
        title = f"{mode}, {case}"
        if isinstance(seconds, str):
            tqdm.write(f"{title}: {seconds}")
            continue
        ratio, noise = min(seconds[revision]) / min(seconds[HERE]), max(map(spread, seconds.values()))
        tqdm.write(f"{title}: {revision} / this = {ratio:.3f} (spread {noise:.2f})")
        ratios.append((ratio, title))
    if ratios:
        mean = geometric_mean([ratio for ratio, _ in ratios])
        print("geometric mean {:.3f}, worst {:.3f} ({})".format(mean, *min(ratios)))


if __name__ == "__main__":
    main()

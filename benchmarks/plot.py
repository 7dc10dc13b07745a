"""The plot: speed as a share of a copy, for each case, ours beside the practical limit and the peers."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .contenders import AS_IT_COMES, COPY, LIMIT, OURS, PEERS, TUNED
from .results import Result

# The palette of Okabe and Ito (2008), which the colour-blind can tell apart; the markers tell in print.
STYLES = {
    OURS: ("#D55E00", "o"),
    LIMIT: ("#555555", "|"),
    TUNED: ("#0072B2", "s"),
    AS_IT_COMES: ("#56B4E9", "s"),
    "ONNX Runtime": ("#009E73", "^"),
    "JAX": ("#CC79A7", "D"),
    "NumPy": ("#000000", "x"),
}
matplotlib.rcParams["svg.hashsalt"] = "gn_fast"  # the same file from the same numbers
TICKS = (0.003, 0.01, 0.03, 0.1, 0.3, 1)


def draw(panels: list[list[Result]], path: Path) -> None:
    """One panel for the results of each mode, written to `path` as .png and .svg."""
    size = (2.5 + 4.2 * len(panels), 1.4 + 0.27 * max(map(len, panels)))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, results in zip(axes[0], panels, strict=True):
        _panel(axis, results)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("speed as a share of a copy of the same bytes (logarithmic)", fontsize="medium")
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _panel(axis: Any, results: list[Result]) -> None:
    names = [result.case.name for result in results]
    for depth, contender in enumerate((OURS, LIMIT, *PEERS)):
        colour, marker = STYLES[contender]
        points = [
            (result.ratio(COPY, result.ours if contender == OURS else contender), result.case.name)
            for result in results
            if contender in result.seconds
        ]
        if points:
            shares, cases = zip(*points, strict=True)
            axis.plot(shares, cases, marker, color=colour, label=contender, markersize=6, zorder=9 - depth)
    axis.set_yticks(range(len(names)), names)
    axis.set_title(results[0].mode.title, fontsize="medium")
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick:.1%}" if tick < 0.01 else f"{tick:.0%}" for tick in TICKS])
    axis.minorticks_off()
    axis.axvline(1, color="#555555", linewidth=1, linestyle="--")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlim(right=max(1.25, axis.get_xlim()[1]))
    axis.set_ylim(len(names) - 0.5, -0.5)

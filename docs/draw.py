"""Draws the pictures of the tutorial: python docs/draw.py"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import gn_fast

DOCS = Path(__file__).parent
BEFORE, WRONG, RIGHT = "#56B4E9", "#D55E00", "#009E73"  # Okabe and Ito (2008)
GROUPS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
matplotlib.rcParams.update(
    {"svg.hashsalt": "gn_fast", "axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
)


def panels(titles, **shared):
    figure = Figure((8, 2.8), layout="constrained")
    axes = figure.subplots(1, len(titles), **shared)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize="medium")
        axis.set_yticks([])
    return figure, axes


def save(figure, name):
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def mistake():
    """What the root does to the values of the tutorial's x."""
    x = np.random.default_rng(0).random((16, 16, 64, 80), dtype=np.float32)
    slabs = x.reshape(16, 4, -1)
    rootless = (slabs - slabs.mean(-1, keepdims=True)) / (slabs.var(-1, keepdims=True) + 1e-5)
    shown = {"x": x, "/ (var + eps)": rootless, "/ sqrt(var + eps)": gn_fast.group_norm(x, 4)}
    figure, axes = panels(shown, sharex=True, sharey=True)
    for axis, values, colour in zip(axes, shown.values(), (BEFORE, WRONG, RIGHT), strict=True):
        axis.hist(values.ravel(), np.linspace(-7, 7, 141), density=True, histtype="stepfilled", color=colour)
        axis.set_xlabel(f"mean {abs(values.mean()):.2f}, std {values.std():.2f}")
    save(figure, "root")


def groups():
    """Groups of different means and spreads, which have the same afterwards."""
    rng = np.random.default_rng(0)
    spread, mean = np.array([[1, 2, 4, 1.5], [-6, 0, 8, 16]])[..., None]
    x = (mean + spread * rng.standard_normal((4, 20_000))).reshape(1, 8, -1)  # two channels each
    figure, axes = panels(("x", "gn_fast.group_norm(x, 4)"))
    for axis, values in zip(axes, (x, gn_fast.group_norm(x, 4)), strict=True):
        axis.hist(values.reshape(4, -1).T, 60, density=True, histtype="step", linewidth=1.8, color=GROUPS)
    save(figure, "groups")


if __name__ == "__main__":
    mistake()
    groups()

"""The tutorial's pictures: python docs/pictures.py. Grey on nothing, so that they can be read in light and dark."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

GREY = "#808080"
FOLDER = Path(__file__).parent / "pictures"


def picture(name, values, colour, ticks):
    figure, axes = plt.subplots(figsize=(6, 1.8), layout="constrained")
    axes.hist(values.ravel(), bins=np.linspace(-6.5, 6.5, 131), color=colour)
    axes.set(yticks=[], xlim=(-6.5, 6.5), xticks=ticks)
    axes.tick_params(colors=GREY)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    figure.savefig(FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "gn_fast"  # the same file from the same data
    x = np.random.default_rng(0).random((16, 16, 64, 80), dtype=np.float32)
    slabs = x.reshape(16, 4, -1)
    centred, var = slabs - slabs.mean(-1, keepdims=True), slabs.var(-1, keepdims=True)
    picture("before", x, "#4c8bbf", [-6, -3, 0, 1, 3, 6])
    picture("after", centred / np.sqrt(var + 1e-5), "#3a9d5d", [-6, -3, -1, 0, 1, 3, 6])
    picture("rootless", centred / (var + 1e-5), "#c8553d", [-6, -3, -1, 0, 1, 3, 6])

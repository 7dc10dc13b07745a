"""`python -m benchmarks.accuracy`: the worst errors of float32, in ulp at the scales of docs/numerics.md.

Each is the largest of some shapes, against the exact oracles of the tests; PyTorch's beside it, if there is
any.
"""

import sys
from pathlib import Path

import numpy as np

import gn_fast

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import EPS32, LAYOUTS, LEVELS, exact_group_norm, in_layout, normal
from test_gradient import exact_gradient

try:
    import torch
except ImportError:
    torch = None

SHAPES = [
    ((2, 32, 40, 41), 8),
    ((3, 64, 7, 7), 8),
    ((4, 64, 4, 4), 16),
    ((1, 16, 16, 16, 16), 4),
    ((64, 96), 3),
]
CHANNELS = [((2, 6, 2550), 2), ((3, 64, 49), 8), ((4, 64, 16), 16), ((2, 640, 1), 5)]
FORMATS = {4: "channels_last", 5: "channels_last_3d"}


def forward(ratio):
    """The worst of y at |mean| / std, for each level and PyTorch in both layouts."""
    worst = {}
    for shape, groups in SHAPES:
        rng = np.random.default_rng(1)
        x, (weight, bias) = normal(rng, shape, mean=ratio), normal(rng, (2, shape[1]))
        exact, scale = exact_group_norm(x, groups, weight, bias)
        for layout in LAYOUTS:
            results = {}
            for level in LEVELS:
                with gn_fast.use_isa(level):
                    results[level] = gn_fast.group_norm(in_layout(x, layout), groups, weight, bias)
            if torch and (layout == "channels-first" or len(shape) in FORMATS):
                t = torch.from_numpy(x)
                if layout == "channels-last":
                    t = t.to(memory_format=getattr(torch, FORMATS[len(shape)]))
                weights = map(torch.from_numpy, (weight, bias))
                results["PyTorch"] = torch.nn.functional.group_norm(t, groups, *weights).numpy()
            for name, y in results.items():
                error = float(np.max(np.abs(y - exact) / (EPS32 * scale)))
                worst[name, layout] = max(error, worst.get((name, layout), 0.0))
    return worst


def gradient(ratio):
    """The worst of dx in ulp, and of dweight relative to its largest value, of gn_fast and PyTorch."""
    worst = np.zeros(4)
    for shape, groups in CHANNELS:
        rng = np.random.default_rng(0)
        x, dy, weight = normal(rng, shape, mean=ratio), normal(rng, shape), normal(rng, shape[1])
        exact, scale, exact_dweight, _ = exact_gradient(dy, x, groups, weight)

        def errors(dx, dweight):
            of_dx = np.max(np.abs(dx - exact) / (EPS32 * scale))  # noqa: B023
            return [of_dx, np.max(np.abs(dweight - exact_dweight)) / np.abs(exact_dweight).max()]  # noqa: B023

        for layout in LAYOUTS:
            arrays = in_layout(dy, layout), in_layout(x, layout)
            dx, dweight, _ = gn_fast.group_norm_backward(*arrays, groups, weight)
            worst[:2] = np.maximum(worst[:2], errors(dx, dweight))
        if torch:
            t, w = (torch.from_numpy(a).requires_grad_() for a in (x, weight))
            torch.nn.functional.group_norm(t, groups, w).backward(torch.from_numpy(dy))
            worst[2:] = np.maximum(worst[2:], errors(t.grad.numpy(), w.grad.numpy()))
    return worst


def main():
    names = [(name, layout) for name in (*LEVELS, "PyTorch") for layout in LAYOUTS]
    print("| mean / std |", " | ".join(f"{name}, {layout}" for name, layout in names), "|")
    print("|---:|" + "---:|" * len(names))
    for ratio in (0.0, 1.0, 30.0, 300.0, 1e4, 1e6):
        worst = forward(ratio)
        print(f"| {ratio:g} |", " | ".join(f"{worst.get(name, np.nan):.3g}" for name in names), "|")
    print("\n| mean / std | dx | dweight | dx, PyTorch | dweight, PyTorch |\n|---:|---:|---:|---:|---:|")
    for ratio in (0.0, 1e2, 1e4, 1e5):
        print(f"| {ratio:g} |", " | ".join(f"{v:.2g}" for v in gradient(ratio)), "|")


if __name__ == "__main__":
    main()

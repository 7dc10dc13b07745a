"""`python benchmarks/accuracy.py`: the tables of worst errors in docs/numerics.md, in Markdown.

Each number is the largest of some shapes and seeds, against exact sums (`math.fsum`) or, for float64, sums
of 80 bits (x86's long double); PyTorch's stands beside it, if it is installed. It takes half a minute.
"""

import math
import sys
from pathlib import Path

import numpy as np

import gn_fast
from gn_fast import Moments, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import (
    ACTIVATIONS,
    DTYPES,
    EPS32,
    EPS64,
    FAMILIES,
    bound,
    exact_group_norm,
    in_layout,
    normal,
    per_channel,
    slabs_of,
    spacing,
)
from test_gradient import exact_gradient

try:
    import torch
except ImportError:
    torch = None

PEER = "PyTorch"
OTHERS = [d for d in DTYPES if d != np.float32]
WALKS = {  # what the shapes of each are, and in which order of memory
    "channels-first": "channels-first",
    "channels-last": "channels-last",
    "short": "channels-first",
}
LONG = [
    ((2, 32, 40, 41), 8),
    ((3, 64, 7, 7), 8),
    ((4, 64, 4, 4), 16),
    ((1, 16, 16, 16, 16), 4),
    ((2, 42, 25, 3), 2),
    ((1, 2, 200, 330), 1),
]
SHAPES = {
    "channels-first": LONG,
    "channels-last": [*LONG, ((1, 1026, 17, 2), 2), ((2, 42, 7, 1), 2)],
    "short": [((64, 96), 3), ((2, 640), 5), ((40, 1030), 5), ((3, 42, 7, 1), 2), ((2, 24, 3, 5), 3)],
}
SEEDS = range(5)
RATIOS = (0.0, 1.0, 30.0, 300.0, 1e4, 1e6)  # |mean| / std


def title(family):
    """Levels that share their bits, as one column."""
    return ", ".join(level.removeprefix("x86_64_") for level in family)


COLUMNS = [title(family) for family in FAMILIES]


def problems(walk, dtype, ratio):
    """The generator, x, groups, and weight and bias, which 16 bits have in float32, as in mixed precision."""
    for (shape, groups), seed in ((s, i) for s in SHAPES[walk] for i in SEEDS):
        rng = np.random.default_rng(seed)
        x = in_layout(normal(rng, shape, dtype, mean=ratio), WALKS[walk])
        yield rng, x, groups, *normal(rng, (2, shape[1]), np.float64 if dtype == np.float64 else np.float32)


def tensor(a):
    """Of the same memory, so of the same order; through float32 for bfloat16, which loses nothing."""
    if a.dtype.name != "bfloat16":
        return torch.from_numpy(a)
    return torch.from_numpy(a.astype(np.float32)).to(torch.bfloat16)


def array(t):
    """Of a tensor, in float32 if it is bfloat16."""
    return (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()


def peer_is_there(walk, x):
    """PyTorch knows channels-last for four and five dimensions."""
    return torch is not None and (walk != "channels-last" or x.ndim > 3)


class Worst(dict):
    """The largest error of each row and column."""

    def add(self, key, errors):
        """Note an array of them."""
        largest = float(np.max(errors, initial=0.0))
        self[key] = largest if math.isnan(largest) else max(largest, self.get(key, 0.0))

    def table(self, head, rows, columns):
        """Print rows (their names and keys) under columns."""
        print(f"\n| {head} |", " | ".join(columns.values()), "|")
        print("|:---|" + "---:|" * len(columns))
        for name, key in rows.items():
            cells = [f"{self[key, c]:.2g}" if (key, c) in self else "" for c in columns]
            print(f"| {name} |", " | ".join(cells), "|")


def each_family(call):
    """What a call gives on the best level of each family."""
    for family in FAMILIES:
        with gn_fast.use_isa(family[-1]):
            yield title(family), call()


# ---- y ---------------------------------------------------------------------------------------------------


def forward(worst, walk, dtype, ratio, key, error_of):
    """Note the errors of y under (key, column)."""
    for _, x, groups, weight, bias in problems(walk, dtype, ratio):
        exact, scale = error_of(x, groups, weight, bias)
        results = dict(each_family(lambda: gn_fast.group_norm(x, groups, weight, bias)))  # noqa: B023
        if peer_is_there(walk, x):
            parameters = map(tensor, (weight, bias))
            results[PEER] = array(torch.nn.functional.group_norm(tensor(x), groups, *parameters))
        for name, y in results.items():
            worst.add((key, name), np.abs(y.astype(exact.dtype) - exact) / scale)


def in_ulp(x, groups, weight, bias):
    """Exact y, and an ulp of float32 at the scale of its bound."""
    exact, scale = exact_group_norm(x, groups, weight, bias)
    return exact, EPS32 * scale


def in_bounds(x, groups, weight, bias):
    """Exact y, and its bound for 16 bits."""
    exact, scale = exact_group_norm(x.astype(np.float64), groups, weight, bias)
    return exact, bound(exact, scale, x.dtype)


def in_80_bits(x, groups):
    """xhat, mean and rstd of float64 data, for each slab."""
    slabs = slabs_of(x.astype(np.longdouble), groups)
    mean = slabs.mean(-1, keepdims=True)
    mean += (slabs - mean).mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(((slabs - mean) ** 2).mean(-1, keepdims=True) + np.longdouble(1e-5))
    return (slabs - mean) * rstd, mean, rstd


def in_ulp_of_float64(x, groups, weight, bias):
    """Exact y, and an ulp at the scale of its bound."""
    xhat, mean, rstd = in_80_bits(x, groups)
    near = abs(xhat) + np.maximum(abs(mean) * rstd, 1 / 16)
    w, b = (per_channel(v.astype(np.longdouble), x.ndim) for v in (weight, bias))
    return xhat.reshape(x.shape) * w + b, EPS64 * (abs(w) * near.reshape(x.shape) + abs(b))


def tables_of_y():
    """float32 by walk and mean; the other types by walk."""
    for walk in WALKS:
        worst = Worst()
        for ratio in RATIOS:
            forward(worst, walk, np.float32, ratio, ratio, in_ulp)
        columns = {c: c for c in COLUMNS} | ({PEER: PEER} if torch else {})
        worst.table(f"{walk}, mean / std", {f"{r:g}": r for r in RATIOS}, columns)
    worst, rows = Worst(), {}
    for dtype in OTHERS:
        ratios, error_of = (RATIOS, in_ulp_of_float64) if dtype == np.float64 else (RATIOS[:4], in_bounds)
        for walk in WALKS:
            rows[f"{dtype.name}, {walk}"] = key = dtype.name, walk
            for ratio in ratios:
                forward(worst, walk, dtype, ratio, key, error_of)
    worst.table("y", rows, columns)


# ---- the gradient ----------------------------------------------------------------------------------------


def exact_in_80_bits(dy, x, groups, weight):
    """Of float64 data what exact_gradient gives, but for dbias. The floor of the scale is the forward's."""
    xhat, mean, rstd = in_80_bits(x, groups)
    products = dy.astype(np.longdouble) * xhat.reshape(x.shape)
    weighted = slabs_of(dy * per_channel(weight.astype(np.longdouble), x.ndim), groups)
    a, b = (v.mean(-1, keepdims=True) for v in (weighted, weighted * xhat))
    floor = np.sqrt((weighted**2).mean(-1, keepdims=True)) * np.maximum(abs(mean) * rstd, 1 / 16)
    scale = rstd * (abs(weighted) + abs(a) + abs(xhat * b) + floor)
    dx = rstd * (weighted - a - xhat * b)
    return dx.reshape(x.shape), scale.reshape(x.shape), products.sum((0, *range(2, x.ndim)))


def gradient(worst, walk, dtype, ratio, key):
    """Note the errors of dx, in ulp (16 bits: in bounds), and of dweight, relative to its largest value."""
    for rng, x, groups, weight, _ in problems(walk, dtype, ratio):
        dy = in_layout(normal(rng, x.shape, dtype), WALKS[walk])
        if dtype == np.float64:
            exact, scale, exact_dweight = exact_in_80_bits(dy, x, groups, weight)
            scale = EPS64 * scale
        else:
            flat = (np.reshape(a.astype(np.float64), (*x.shape[:2], -1)) for a in (dy, x))
            exact, scale, exact_dweight, _ = exact_gradient(*flat, groups, weight.astype(np.float64))
            exact, scale = (a.reshape(x.shape) for a in (exact, EPS32 * scale))
            if dtype != np.float32:
                nearest = 0.5 * spacing(np.abs(exact) + 4 * scale, x.dtype)
                scale = np.maximum(spacing(exact, x.dtype), 4 * scale + nearest)
        results = dict(each_family(lambda: gn_fast.group_norm_backward(dy, x, groups, weight)))  # noqa: B023
        if peer_is_there(walk, x):
            t, w = (tensor(a).requires_grad_() for a in (x, weight))
            torch.nn.functional.group_norm(t, groups, w).backward(tensor(dy))
            results[PEER] = array(t.grad), array(w.grad)
        for name, (dx, dweight, *_) in results.items():
            worst.add((key, f"dx, {name}"), np.abs(dx.astype(exact.dtype) - exact) / scale)
            off = np.abs(dweight.astype(exact_dweight.dtype) - exact_dweight)
            worst.add((key, f"dweight, {name}"), off / np.abs(exact_dweight).max())


def tables_of_the_gradient():
    """float32 by walk and mean; the other types by walk."""
    columns = {f"{what}, {c}": f"{what}, {c}" for what in ("dx", "dweight")
               for c in [*COLUMNS, *([PEER] if torch else [])]}  # fmt: skip
    worst, rows = Worst(), {}
    for walk in WALKS:
        for ratio in (0.0, 30.0, 1e3, 1e5):
            rows[f"float32, {walk}, {ratio:g}"] = key = walk, ratio
            gradient(worst, walk, np.float32, ratio, key)
    worst.table("mean / std", rows, columns)
    worst, rows = Worst(), {}
    for dtype in OTHERS:
        for walk in WALKS:
            rows[f"{dtype.name}, {walk}"] = key = dtype.name, walk
            for ratio in RATIOS[: 5 if dtype == np.float64 else 3]:
                gradient(worst, walk, dtype, ratio, key)
    worst.table("gradient", rows, columns)


# ---- activations -----------------------------------------------------------------------------------------


def table_of_activations():
    """In ulp at the scale |act(z)|, where it is a normal number, and at |act'(z)| or 1/8 if that is larger.

    With a mean of 0 and a variance of 1 that are given, z is x; a residual has the gradient dy * act'(z).
    """
    every = np.arange(0, 2**32, 499, dtype=np.uint64).astype(np.uint32).view(np.float32)
    z = np.concatenate([every[np.isfinite(every)], np.linspace(-110, 110, 1_000_001, dtype=np.float32)])
    z = z[np.abs(z) <= 110]  # beyond, each is 0, z, its slope times z, or 1
    x = z.reshape(1, 1, -1)
    given = {"eps": 0.0, "moments": Moments([[z.size]], [[0.0]], [[float(z.size)]])}
    worst = Worst()
    for activation in ACTIVATIONS[2:]:
        exact, slope = reference._ACTIVATIONS[activation](z.astype(np.float64))
        normals = np.abs(exact) >= np.finfo(np.float32).tiny
        for family in FAMILIES:
            with gn_fast.use_isa(family[-1]):
                y = gn_fast.group_norm(x, 1, activation=activation, **given).ravel()
                *_, dresidual = gn_fast.group_norm_backward(
                    np.ones_like(x), x, 1, residual=np.zeros_like(x), activation=activation, **given
                )
            off = np.abs(y - exact)[normals] / (EPS32 * np.abs(exact[normals]))
            worst.add((activation, title(family)), off)
            off = np.abs(dresidual.ravel() - slope) / (EPS32 * np.maximum(np.abs(slope), 1 / 8))
            worst.add((activation, title(family) + "'"), off)
    columns = {c: f"act, {c}" for c in COLUMNS} | {c + "'": f"act', {c}" for c in COLUMNS}
    worst.table("activation", {a: a for a in ACTIVATIONS[2:]}, columns)


def main():
    """Print all tables."""
    with np.errstate(all="ignore"):
        tables_of_y()
        tables_of_the_gradient()
        table_of_activations()


if __name__ == "__main__":
    main()

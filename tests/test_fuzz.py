"""Every argument of every function at once, whatever it lies on: python tests/test_fuzz.py --seconds 600

pytest runs what was found once, and a hundred calls more. A `Case` is plain values; arrays follow from them:
one that fails is made smaller by Hypothesis, can be read, and is pasted above the test as an `@example`. The
bounds are those of test_fused.py and test_gradient.py. Scales are powers of two, and eps goes with that of x:
they change no bound.

Cases are made by Hypothesis, and not by atheris, which follows the coverage of interpreted code: here that is
the tests' own. The compiled branches are chosen by sizes, strides and dtypes, which are drawn as such.
"""

import argparse
import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
from helpers import ACTIVATIONS, DTYPES, EPS64, FAMILIES, LEVELS, assert_same_bits, assert_same_moments
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st
from test_fused import assert_as_reference as assert_forward
from test_gradient import assert_as_reference as assert_gradient
from test_gradient import assert_close, assert_same_gradients, expected_and_tolerances
from test_gradient_sums import assert_same_sums, assert_sums_as_reference
from test_layouts import order_of

import gn_fast
from gn_fast import GradientSums, Moments, _core, reference

FLOATS = [dtype.name for dtype in DTYPES]
SPELLINGS = ["(C,)", "(N, C)", "(1, C)", "(C, 1...)", "(N, C, 1...)", "()"]
SAME_AS = {"swish": "silu", ("leaky_relu", 0.01): "leaky_relu"}
MEMORY = ["C", "channels-last", "any"]
LARGEST = 150_000  # values of x: some calls are shared by threads, from 2^15 on


@dataclasses.dataclass(frozen=True)
class Case:
    """A call. None is an argument that is not given."""

    seed: int
    dtype: str
    n: int
    groups: int
    size: int  # channels of a group
    spatial: tuple
    axis: int
    values: str
    scale: int  # x is times 2^scale
    dy_dtype: str
    dy_scale: int
    weight: tuple | None  # spelling, dtype
    bias: tuple | None
    residual: str | None
    activation: object
    eps: float
    mask: float | None  # how much of it is True
    moments: str | None
    sums: str | None
    memory: str
    level: int
    threads: int
    over: int  # where out begins, in bytes of the memory of all arguments; negative: apart


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([*FLOATS, "int16", "uint8", "bool"]))
    n, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 32]))
    size = draw(st.sampled_from([1, 2, 3, 4, 7, 16, 43]))
    lengths = st.one_of(st.integers(0, 20), st.sampled_from([31, 49, 64, 257, 512, 1537, 4099, 65537]))
    spatial = []
    for _ in range(draw(st.integers(0, 3))):
        spatial.append(min(draw(lengths), LARGEST // max(1, n * groups * size * math.prod(spatial))))
    wide = {"float64": 400, "float32": 60, "bfloat16": 60}.get(dtype, 0)
    parameter = st.none() | st.tuples(st.sampled_from(SPELLINGS), st.sampled_from(FLOATS))
    moments = draw(st.sampled_from([None, None, None, "own", "other"]))
    dy_dtype = draw(st.sampled_from(FLOATS))
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=dtype,
        n=n,
        groups=groups,
        size=size,
        spatial=tuple(spatial),
        axis=draw(st.sampled_from([d for d in range(-1 - len(spatial), len(spatial) + 2) if d])),
        values=draw(st.sampled_from(["normal", "offset", "few", "poisoned"])),
        scale=draw(st.just(0) | st.integers(-wide, wide)),
        dy_dtype=dy_dtype,
        dy_scale=0 if dy_dtype == "float16" else draw(st.just(0) | st.integers(-20, 20)),
        weight=draw(parameter),
        bias=draw(parameter),
        residual=draw(st.none() | st.sampled_from(FLOATS)),
        activation=draw(st.sampled_from([*ACTIVATIONS, *SAME_AS])),
        eps=draw(st.sampled_from([1e-5, 1e-2, 1.0])),
        mask=draw(st.sampled_from([None, None, 0.0, 0.1, 0.5, 0.99, 1.0])),
        moments=moments,
        sums=draw(st.sampled_from([None, "zeros", "whole"])) if moments == "own" else None,
        memory=draw(st.sampled_from(MEMORY)),
        level=draw(st.integers(0, len(LEVELS) - 1)),
        threads=draw(st.integers(2, 3)),
        over=draw(st.integers(-1, 1 << 12) | st.integers(0, 1 << 21)),
    )


# ---- the arrays of a case --------------------------------------------------------------------------------


def laid_out(rng, values, memory, axis=1):
    """The values in memory of this order; "any" has steps, directions and neighbours too."""
    ndim = values.ndim
    order, steps, pads = np.arange(ndim), np.ones(ndim, int), np.zeros(ndim, int)
    if memory == "channels-last" and ndim > 2:
        order = np.array([*(d for d in range(ndim) if d != axis % ndim), axis % ndim])
    if memory == "any":
        order = rng.permutation(ndim)
        steps, pads = rng.choice([1, 1, 1, 2, -1, -2], ndim), rng.choice([0, 0, 1, 5], ndim)
    shape = np.array(values.shape, int) * abs(steps) + 2 * pads
    whole = np.zeros(shape[order], values.dtype).transpose(np.argsort(order))
    inner = whole[tuple(slice(p, s - p) for p, s in zip(pads, shape, strict=True))]
    view = inner[tuple(slice(None, None, step) for step in steps)]
    view[...] = values
    return view


def drawn(rng, shape, dtype, values, scale=0):
    dtype = np.dtype(dtype)
    if dtype.kind in "iub":
        return rng.integers(0, 2 if dtype.kind == "b" else 200, shape).astype(dtype)
    a = rng.integers(0, 2, shape).astype(float) if values == "few" else rng.standard_normal(shape)
    a += 1000 * (values == "offset")
    if values == "poisoned":
        a[rng.random(shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf])
    return np.ldexp(a, scale).astype(dtype)


def spelled(rows, spelling, ndim):
    """A parameter of shape (C,) or (N, C) as it is passed."""
    if spelling == "()":
        return rows[0].reshape(())
    ones = (1,) * (ndim - 2) if "1..." in spelling else ()
    return rows.reshape(*((1,) if spelling == "(1, C)" else ()), *rows.shape, *ones)


def arrays_of(case):
    """dy, the arguments as the reference's bounds take them, and the parameters as they are passed."""
    rng = np.random.default_rng(case.seed)
    c = case.groups * case.size

    def shaped(channels):
        shape = [case.n, *case.spatial]
        shape.insert(case.axis % (len(shape) + 1), channels)
        return tuple(shape)

    x = drawn(rng, shaped(c), case.dtype, case.values, case.scale)
    scale = 2.0 ** (case.scale if x.dtype.kind not in "iub" else 0)
    arguments = {"num_groups": case.groups, "axis": case.axis, "eps": case.eps * scale**2}
    arguments["x"] = laid_out(rng, x, case.memory, case.axis)
    passed = {}
    for name in ("weight", "bias"):
        if getattr(case, name):
            spelling, dtype = getattr(case, name)
            rows = rng.standard_normal((case.n, c) if "N" in spelling else c).astype(dtype)
            rows = np.full_like(rows, rows[0]) if spelling == "()" else rows
            arguments[name] = rows
            passed[name] = spelled(rows, spelling, x.ndim)
    if case.residual:
        residual = drawn(rng, shaped(c), case.residual, "normal")
        arguments["residual"] = laid_out(rng, residual, rng.choice([case.memory, *MEMORY]), case.axis)
    if case.mask is not None:
        part = [1 if rng.random() < 0.2 else length for length in shaped(1)]
        arguments["mask"] = laid_out(rng, rng.random(part) < case.mask, case.memory)
    dy = drawn(rng, x.shape, case.dy_dtype, "normal", case.dy_scale)
    dy = laid_out(rng, dy, rng.choice([case.memory, *MEMORY]), case.axis)
    if case.moments == "other":
        count = rng.integers(0, 5, (case.n, case.groups))
        mean = 3 * scale * rng.standard_normal(count.shape)
        arguments["moments"] = Moments(count, mean, scale**2 * count * rng.random(count.shape))
    arguments["activation"] = SAME_AS.get(case.activation, case.activation)
    return dy, arguments, passed | {"activation": case.activation}


def in_one_memory(arrays, begin, dtype):
    """Copies side by side, each in its order of memory, and an `out` like x that begins anywhere there."""
    starts = [*itertools.accumulate((-(-a.nbytes // 16) * 16 for a in arrays.values()), initial=0)]
    end = starts[-1] + 16
    memory = np.zeros(end + arrays["x"].size * dtype.itemsize, np.uint8)

    def like(a, dtype, start):
        order = sorted(range(a.ndim), key=lambda d: -abs(a.strides[d]))
        flat = memory[start : start + a.size * dtype.itemsize].view(dtype)
        return flat.reshape([a.shape[d] for d in order]).transpose(np.argsort(order))

    copies = {name: like(a, a.dtype, start) for (name, a), start in zip(arrays.items(), starts, strict=False)}
    for name, copy in copies.items():
        copy[...] = arrays[name]
    return copies, like(arrays["x"], dtype, begin % end // dtype.itemsize * dtype.itemsize)


# ---- what has to hold ------------------------------------------------------------------------------------


def results(dy, arguments, sums, **more):
    """Of all four functions."""
    arguments = arguments | more
    statistics = {name: arguments[name] for name in ("x", "num_groups", "axis", "mask", "num_threads")
                  if name in arguments}  # fmt: skip
    y, m = gn_fast.group_norm(**arguments, return_moments=True)
    gradients = gn_fast.group_norm_backward(dy, **arguments, sums=sums)
    return y, m, gradients, gn_fast.group_gradient_sums(dy, **arguments), gn_fast.group_moments(**statistics)


def assert_same_results(a, b, what):
    assert_same_bits(a[0], b[0], f"{what}: y")
    assert_same_moments(a[1], b[1], what)
    assert_same_gradients(a[2], b[2], what)
    assert_same_sums(a[3], b[3], what)
    assert_same_moments(a[4], b[4], f"{what}: group_moments")


def assert_moments_as_reference(m, x, arguments):
    """Counts exactly; mean and deviation to 8 u and 16 u of what float32 (float64) carries of the values."""
    expected = reference.group_moments(x, **arguments)
    np.testing.assert_array_equal(m.count, expected.count)
    u = 2.0**-53 if x.dtype.itemsize == 8 or x.dtype.kind in "iub" else 2.0**-24
    with np.errstate(all="ignore"):
        size = np.abs(expected.mean) + np.sqrt(expected.var)
        wrong_mean = np.abs(m.mean - expected.mean) > 8 * u * size
        root, wanted = np.sqrt(m.var), np.sqrt(expected.var)
        wrong_deviation = np.abs(root - wanted) > 16 * u * size
    assert not wrong_mean.any(), "mean"
    assert not wrong_deviation.any(), "m2"
    for field in ("mean", "m2"):
        np.testing.assert_array_equal(np.isnan(getattr(m, field)), np.isnan(getattr(expected, field)), field)


def assert_parameters_as_passed(gradients, passed, plain, whole):
    """The gradient of each spelling is that of rows; of a scalar it is the sum of the float64 sums."""
    for i, name in ((1, "weight"), (2, "bias")):
        if name in passed:
            gradient, terms = gradients[i], (whole.dweight, whole.dbias)[i - 1]
            assert (gradient.shape, gradient.dtype) == (passed[name].shape, passed[name].dtype)
            if gradient.ndim:
                assert_same_bits(gradient.ravel(), plain[i].ravel(), name)
            else:
                assert_close(gradient, terms.sum(), terms.size * EPS64 * np.abs(terms).sum(), name)


def check(case):
    with gn_fast.use_isa(LEVELS[case.level % len(LEVELS)]):
        check_contract(case)


def check_contract(case):
    """Bounds, bits and untouched inputs, of one case."""
    dy, arguments, passed = arrays_of(case)
    x, moments = arguments["x"], arguments.get("moments")
    statistics = {name: arguments[name] for name in ("num_groups", "axis", "mask") if name in arguments}
    if case.moments == "own":
        arguments["moments"] = moments = gn_fast.group_moments(x, **statistics)
    inputs = {name: a for name, a in ({"dy": dy} | arguments).items() if isinstance(a, np.ndarray)}
    before = {name: a.copy() for name, a in inputs.items()}

    y, m, plain, whole, own = results(dy, arguments, None)
    assert_forward(y, arguments, "y")
    assert_gradient(plain, dy, arguments, "gradient")
    assert_sums_as_reference(whole, dy, arguments, "sums")
    assert_moments_as_reference(own, x, statistics)
    if moments is None:
        assert_same_moments(m, own, "returned")
    assert order_of(y) == order_of(plain[0]) == order_of(np.positive(x, dtype=y.dtype))

    # As passed, with the sums of the whole or none, on more threads and on each level: the same bits.
    as_rows, arguments = arguments, arguments | passed
    sums = {"zeros": GradientSums.zeros(case.n, case.groups * case.size), "whole": whole}.get(case.sums)
    base = results(dy, arguments, sums, num_threads=1)
    assert_same_bits(base[0], y, "y as passed")
    if sums is None:
        assert_same_bits(base[2][0], plain[0], "dx as passed")
        assert_parameters_as_passed(base[2], passed, plain, whole)
    else:
        assert_gradient_of_sums(base[2][0], dy, as_rows, sums)
    assert_same_results(results(dy, arguments, sums, num_threads=case.threads), base, "threads")
    used = LEVELS[case.level % len(LEVELS)]
    for level in next(family for family in FAMILIES if used in family):
        with gn_fast.use_isa(level):
            assert_same_results(results(dy, arguments, sums), base, level)

    assert_out_may_be_anywhere(case, dy, arguments, sums, y.dtype)
    for name, value in before.items():
        assert_same_bits(inputs[name], value, name)


def assert_out_may_be_anywhere(case, dy, arguments, sums, dtype):
    """Over any argument: the same bits as if that had been copied."""
    arrays = {"dy": dy} | {name: a for name, a in arguments.items() if isinstance(a, np.ndarray)}
    if "moments" in arguments:
        arrays |= {name: getattr(arguments["moments"], name) for name in ("count", "mean", "m2")}
    if sums is not None:
        arrays |= {"dweight": sums.dweight, "dbias": sums.dbias}
    for forward in (True, False):
        copies, out = in_one_memory(arrays, case.over, dtype)
        if case.over < 0:
            rng = np.random.default_rng(case.seed)
            out = laid_out(rng, np.zeros(out.shape, dtype), case.memory, case.axis)
        call = arguments | {name: copies[name] for name in arguments if name in copies}
        if "moments" in arguments:
            call["moments"] = Moments(copies["count"], copies["mean"], copies["m2"])
        if forward:
            expected = gn_fast.group_norm(**call)
            assert gn_fast.group_norm(**call, out=out, num_threads=case.threads) is out
            assert_same_bits(out, expected, "y in out")
        else:
            call["dy"] = copies["dy"]
            call["sums"] = None if sums is None else GradientSums(copies["dweight"], copies["dbias"])
            expected = gn_fast.group_norm_backward(**call)
            gradients = gn_fast.group_norm_backward(**call, out=out, num_threads=case.threads)
            assert gradients[0] is out
            assert_same_gradients(gradients, expected, "gradient in out")


def assert_gradient_of_sums(dx, dy, arguments, sums):
    """Dx with given sums: within the bound of the whole, whose terms are these or more."""
    _, tolerances = expected_and_tolerances(dy, **arguments)
    wide = arguments | {"x": arguments["x"].astype(np.float64)}
    with np.errstate(all="ignore"):
        expected = reference.group_norm_backward(dy.astype(np.float64), **wide, sums=sums)[0]
    shape = tolerances[0].shape
    dx, expected = (np.moveaxis(a, arguments["axis"], 1).reshape(shape) for a in (dx, expected))
    assert_close(dx, expected, tolerances[0], "dx of sums")


# ---- a hundred cases, or as many as there is time for ----------------------------------------------------

few = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=50, database=None, phases=[Phase.generate, Phase.shrink], print_blob=False)


# What was found: leaky_relu's own slope was not rounded to float32 where that is computed in float64.
SLOPE_OF_LEAKY_RELU = Case(
    seed=0, dtype="float16", n=1, groups=1, size=1, spatial=(), axis=-1, values="normal", scale=0,
    dy_dtype="float16", dy_scale=0, weight=None, bias=("(C,)", "float64"), residual=None,
    activation=("leaky_relu", 0.01), eps=1e-5, mask=None, moments=None, sums=None, memory="C", level=1,
    threads=2, over=0,
)  # fmt: skip


@pytest.mark.usefixtures("three_processors")
@few
@given(case=cases())
@example(SLOPE_OF_LEAKY_RELU)
def test_every_argument_at_once(case):
    check(case)


def main():
    parser = argparse.ArgumentParser(description="Check cases until the time is over, or one fails.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first 50 cases; the next have the next")
    options = parser.parse_args()
    _core._processors = lambda: 3
    start, number = time.monotonic(), options.seed
    while time.monotonic() < start + options.seconds:
        seed(number)(many(given(case=cases())(check)))()
        number += 1
    print(f"{(number - options.seed) * 50} cases hold, of the seeds {options.seed} to {number - 1}")


if __name__ == "__main__":
    main()

"""Digests of the results of a fixed list of calls: the same on every machine and from every compiler.

`python tests/bits.py` prints them for each instruction set; `.ci/run` compares those of two builds.
`python tests/bits.py renew` writes them to data/digests.txt, to which test_digests.py holds every machine:
after a change of bits that is meant, on x86-64-v3 or better, which can do both with and without fused
multiply-add. It reads what is built, not the sources.

They depend on the kernel alone. Inputs are made of PCG64's integers, whose stream NumPy guarantees, by sums
and differences of multiples of 2^-53: NumPy's distributions, which may change, and libm, which they call,
have no part in them. Results are compared as bits, with one NaN for all.
"""

import itertools
import platform
import sys
from pathlib import Path

import numpy as np
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, LEVELS, digest
from test_bits import OPTIONS, SHAPES, problem

import gn_fast

STORED = Path(__file__).parent / "data/digests.txt"
CASES = [(*case, *rest) for case, *rest in itertools.product(SHAPES, DTYPES, LAYOUTS)]
COLUMNS = ("fused", "separate")  # multiply and add
HEADER = "# By `python tests/bits.py renew`: digests where multiply and add are {}, and {}\n"


class Numbers(np.random.Generator):
    """Generator's, of the two methods that a problem asks for, whose values are the same everywhere."""

    def random(self, shape):
        return (self.bit_generator.random_raw(shape) >> np.uint64(11)) * 2.0**-53

    def standard_normal(self, shape):
        a, b, c, d = self.random((4, *shape))
        return 1.75 * (a + b - c - d)


def narrowed(a, dtype):
    """By float32, so that it does not matter whether a cast from float64 to 16 bits goes that way."""
    return a if a.dtype == bool or dtype == np.float64 else a.astype(np.float32).astype(dtype)


def given(shape, num_groups, dtype, layout):
    """A problem without activation."""
    rng = Numbers(np.random.PCG64(0))
    arguments = problem(shape, num_groups, np.float64, layout, seed=rng, options=OPTIONS[:-1])
    return {name: a if name == "num_groups" else narrowed(a, dtype) for name, a in arguments.items()}


def calls(shape, num_groups, dtype, layout):
    arguments = given(shape, num_groups, dtype, layout)
    plain = {name: arguments[name] for name in ("x", "num_groups")}
    activations = ACTIVATIONS if (shape, num_groups) in SHAPES[:4] else ["gelu"]  # the larger take long
    return {"plain": plain} | {str(each): {**arguments, "activation": each} for each in activations}


def results(call):
    y, moments = gn_fast.group_norm(**call, return_moments=True)
    gradients = gn_fast.group_norm_backward(call["x"], **call)
    sums = gn_fast.group_gradient_sums(call["x"], **call)
    return y, moments.count, moments.mean, moments.m2, *gradients, sums.dweight, sums.dbias


def digests(level, *case):
    """Of the inputs, which no level has a part in, and of each call."""
    shape, _, dtype, layout = case
    arguments = given(*case)
    del arguments["num_groups"]
    found = {"inputs": digest(arguments.values())}
    with gn_fast.use_isa(level):
        found |= {name: digest(results(call)) for name, call in calls(*case).items()}
    return {f"{dtype} {layout} {'x'.join(map(str, shape))} {name}": value for name, value in found.items()}


def column(level):
    """x86-64-v2, and x86 as a baseline, have no fused multiply-add; everything else has."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    return COLUMNS[level == "x86_64_v2" or (level == "baseline" and x86)]


def stored(level):
    """The digests of each call, of a level's kind."""
    lines = [line.rsplit(" ", 2) for line in STORED.read_text().splitlines() if not line.startswith("#")]
    return {name: values[COLUMNS.index(column(level))] for name, *values in lines}


def show():
    for level, case in itertools.product(LEVELS, CASES):
        for name, value in digests(level, *case).items():
            print(level, name, value)


def renew():
    level = {column(level): level for level in LEVELS}
    with STORED.open("w") as file:
        file.write(HEADER.format(*COLUMNS))
        for case in CASES:
            fused, separate = (digests(level[each], *case) for each in COLUMNS)
            file.writelines(f"{name} {fused[name]} {separate[name]}\n" for name in fused)


if __name__ == "__main__":
    {(): show, ("renew",): renew}[tuple(sys.argv[1:])]()

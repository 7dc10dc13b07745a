"""Prints a digest of the results of each call of a fixed set: two builds are to print the same.

Run by `.ci/run` on the builds of two compilers; test_bits.py compares one build with itself.
"""

import itertools

from helpers import ACTIVATIONS, DTYPES, LAYOUTS, LEVELS, digest
from test_bits import OPTIONS, SHAPES, problem

import gn_fast


def results(call):
    y, moments = gn_fast.group_norm(**call, return_moments=True)
    gradients = gn_fast.group_norm_backward(call["x"], **call)
    sums = gn_fast.group_gradient_sums(call["x"], **call)
    return y, moments.count, moments.mean, moments.m2, *gradients, sums.dweight, sums.dbias


def main():
    for (shape, num_groups), dtype, layout in itertools.product(SHAPES, DTYPES, LAYOUTS):
        given = problem(shape, num_groups, dtype, layout, options=OPTIONS[:-1])
        plain = {name: given[name] for name in ("x", "num_groups")}
        activations = ACTIVATIONS if (shape, num_groups) in SHAPES[:4] else ["gelu"]  # the larger take long
        calls = [plain, *({**given, "activation": activation} for activation in activations)]
        for level, call in itertools.product(LEVELS, calls):
            with gn_fast.use_isa(level):
                print(level, dtype, layout, shape, call.get("activation", "plain"), digest(results(call)))


if __name__ == "__main__":
    main()

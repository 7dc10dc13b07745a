"""`python -m benchmarks.scaling`: one case on 1 thread, 2, and so on, and on each instruction set."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import gn_fast

from .cases import CASES, MODES, add_choice
from .contenders import ours
from .problem import Problem
from .timing import race, spread, turn


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    add_choice(parser, "--cases", CASES, default="one-group")
    add_choice(parser, "--modes", MODES, default="out")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    options = parser.parse_args()
    settings = (
        ("threads", gn_fast.num_threads, range(1, gn_fast.get_num_threads() + 1)),
        ("instruction set", gn_fast.use_isa, gn_fast.isa_levels()),
    )
    for mode in options.modes:
        for case in options.cases:
            if not mode.suits(case):
                continue
            contender = ours(Problem(case, mode))
            contender.check(contender.call())
            print(f"\n## {mode.title}: {case.model}, {case.shape} in {case.num_groups} groups\n")
            for what, setting, values in settings:
                call = contender.call
                turns = {str(value): partial(within, partial(setting, value), call) for value in values}
                show(what, race(turns, options.rounds))


def within(setting: Callable[[], AbstractContextManager[None]], call: Callable[[], object]) -> float:
    """A turn under another setting."""
    with setting():
        return turn(call)


def show(what: str, seconds: dict[str, list[float]]) -> None:
    """Speeds relative to the first row's."""
    first = min(next(iter(seconds.values())))
    print(f"| {what} | speed | spread |\n| --- | ---: | ---: |")
    for name, times in seconds.items():
        print(f"| {name} | {first / min(times):.2f} | {spread(times):.2f} |")
    print()


if __name__ == "__main__":
    main()

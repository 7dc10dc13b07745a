"""The clock. Nothing is pinned, and no time means anything but beside another of the same race."""

import time
from collections.abc import Callable, Mapping
from timeit import Timer

TURN = 0.02  # seconds: long enough to have the data in the caches and the threads awake
BATCH = 1e-4  # seconds: calls shorter than this are timed together, as the clock itself costs some 50 ns

Turn = Callable[[], float]


def turn(call: Callable[[], object]) -> float:
    """The best time of a call, of as many as fit in a turn; at least one."""
    time.sleep(0.005)  # another library's idle threads spin for some milliseconds
    timer = Timer(call)
    best = timer.timeit(1)
    end = time.perf_counter() + TURN - best
    while time.perf_counter() < end:
        number = max(1, round(BATCH / best))
        best = min(best, timer.timeit(number) / number)
    return best


def race(turns: Mapping[str, Turn], rounds: int) -> dict[str, list[float]]:
    """A time for each contender and round; every other round goes backwards, so that none is always first."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds):
        for name in list(turns)[:: -1 if i % 2 else 1]:
            times[name].append(turns[name]())
    return times


def spread(times: list[float]) -> float:
    """How noisy a race was: the third quartile of a contender's times over their minimum."""
    return sorted(times)[(3 * len(times) - 1) // 4] / min(times)

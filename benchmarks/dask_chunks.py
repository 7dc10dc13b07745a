"""`python -m benchmarks.dask_chunks`: gn_fast.dask beside dask's own expression of group norm, on its chunks.

Each run is a process of its own, on the threaded scheduler, and writes its result nowhere: what is measured
is the shortest time, and what the process needed at most beyond what it had before, x among it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np

from gn_fast.commands.info import information
from gn_fast.dask import group_norm

GROUPS = 8
SHAPE = (2, 32, 64, 128, 128)  # 256 MiB
CHUNKS = {
    "whole slabs": (1, 8, 64, 128, 128),
    "cut positions": (1, 32, 16, 128, 128),
    "cut positions, small": (1, 32, 8, 64, 64),
}


def expression(x: da.Array, weight: Any, bias: Any) -> da.Array:
    """What one writes without gn_fast."""
    n, c, *spatial = x.shape
    slabs = x.reshape(n, GROUPS, c // GROUPS, *spatial)
    within = tuple(range(2, slabs.ndim))
    mean, var = (f(slabs, axis=within, keepdims=True) for f in (da.mean, da.var))
    xhat = ((slabs - mean) / da.sqrt(var + 1e-5)).reshape(x.shape)
    y: da.Array = xhat * weight[:, None, None, None] + bias[:, None, None, None]
    return y


def ours(x: da.Array, weight: Any, bias: Any) -> da.Array:
    y: da.Array = group_norm(x, GROUPS, weight, bias)
    return y


CONTENDERS: dict[str, Callable[[da.Array, Any, Any], da.Array]] = {"gn_fast": ours, "expression": expression}


class Nowhere:
    """What takes the chunks of a result."""

    def __setitem__(self, place: Any, block: Any) -> None:
        pass


def run(name: str, chunks: str, threads: int, rounds: int) -> dict[str, float]:
    values = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    weight, bias = np.ones((2, SHAPE[1]), np.float32)
    y = CONTENDERS[name](da.from_array(values, chunks=CHUNKS[chunks]), weight, bias)
    times = []
    with dask.config.set(scheduler="threads", num_workers=threads):
        small = CONTENDERS[name](da.ones((1, 32, 2, 2, 2), chunks=(1, 32, 1, 2, 2), dtype="f4"), weight, bias)
        small.compute()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(rounds):
            start = time.perf_counter()
            da.store([y], [Nowhere()], lock=False)
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(times), "MiB": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.dask_chunks", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of the scheduler; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CHUNKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one, options.threads, options.rounds)))
        return
    processor = information()["system"]["processor"]
    print(f"{processor}, {options.threads} threads, dask {dask.__version__}, {SHAPE} in {GROUPS} groups\n")
    print("| chunks | shape of a chunk | dask's expression / gn_fast | its peak, MiB | gn_fast's peak, MiB |")
    print("| --- | --- | ---: | ---: | ---: |")
    for chunks, shape in CHUNKS.items():
        found = {}
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.dask_chunks", "--one", name, chunks]
            command += [f"--threads={options.threads}", f"--rounds={options.rounds}"]
            found[name] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        theirs, mine = found["expression"], found["gn_fast"]
        ratio = theirs["seconds"] / mine["seconds"]
        size = " x ".join(map(str, shape))
        print(f"| {chunks} | {size} | {ratio:.1f} | {theirs['MiB']:.0f} | {mine['MiB']:.0f} |")


if __name__ == "__main__":
    main()

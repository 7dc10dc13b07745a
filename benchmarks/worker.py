"""Processes: this one, whose allocator is tuned, and workers, which race with it turn by turn.

A large result of PyTorch is mapped anew by glibc at every call, and its page faults take longer than the
kernel. Deployments tune that away, or preload tcmalloc or jemalloc, and so does the process of the report, as
claims compare kernels; there PyTorch has the very arrays that gn_fast has. PyTorch as it comes runs in a
worker, because `mallopt` acts on a whole process, on arrays that are equal but lie elsewhere: its ratios
scatter more, on small cases by a factor of two. The rounds are interleaved all the same: everyone has a turn
in each. Every result is checked in the process where it is timed.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gn_fast

from .cases import CASES, MODES, Case, Mode
from .contenders import Call, enter
from .problem import Problem
from .timing import turn

ROOT = Path(__file__).parents[1]
MALLOC = {-4: 0, -1: 2**31 - 1, -2: 64 << 20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def tune_malloc() -> None:
    """Keep freed memory for the next result, from now on; C libraries other than glibc stay as they are."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in MALLOC.items():
            assert ctypes.CDLL(None).mallopt(option, value), f"mallopt refuses {option}"


class Worker:
    """A process that runs the gn_fast installed in `site`, or this one, on one problem at a time."""

    def __init__(self, site: Path | None = None) -> None:
        path = [str(folder) for folder in (site, ROOT) if folder]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.worker"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def enter(self, case: Case, mode: Mode, names: Sequence[str]) -> tuple[list[str], dict[str, str], str]:
        """Who takes part, checked, why the others do not, and gn_fast's file."""
        return tuple(self._ask((case.name, mode.name, names)))

    def turn(self, name: str) -> float:
        """The time of a turn of one who takes part."""
        return self._ask(name)

    def _ask(self, request: Any) -> Any:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return answer


def serve() -> None:
    """The other side of a worker."""
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        try:
            if isinstance(request, str):
                answer = turn(calls[request])
            else:
                calls = {}  # lets go of the last problem's memory first
                case = next(case for case in CASES if case.name == request[0])
                mode = next(mode for mode in MODES if mode.name == request[1])
                calls, absent = enter(Problem(case, mode), request[2])
                answer = [list(calls), absent, gn_fast.__file__]
        except Exception as error:  # an older revision need not have everything
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()

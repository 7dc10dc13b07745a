"""Another revision of gn_fast, built in a worktree and run in its own process, turn by turn with this one."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gn_fast

from .cases import CASES, MODES, Case, Mode
from .contenders import FRESH, OURS, Call, enter
from .problem import Problem
from .timing import race, turn

ROOT = Path(__file__).parents[1]
HERE = "this"


class Worker:
    """A process that runs the gn_fast installed in `site`, or this one, on one problem at a time."""

    def __init__(self, site: Path | None = None) -> None:
        path = [str(folder) for folder in (site, ROOT) if folder]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.compare"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: Any) -> Any:
        """Send the names of a case and a mode and get gn_fast's file, or None and get a turn's time."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """The other side of `Worker.ask`."""
    call: Call = NotImplemented
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        try:
            if request is None:
                answer = turn(call)
            else:
                call = NotImplemented  # lets go of the last problem's memory first
                case = next(case for case in CASES if case.name == request[0])
                mode = next(mode for mode in MODES if mode.name == request[1])
                name = FRESH if mode.fresh else OURS
                call = enter(Problem(case, mode), [name])[0][name]
                answer = gn_fast.__file__
        except Exception as error:  # an older revision need not have everything
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


@contextlib.contextmanager
def built(revision: str) -> Iterator[Path]:
    """A folder where a revision is installed, for as long as the block lasts."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree, site = Path(folder, "tree"), Path(folder, "site")
        subprocess.run([*git, "add", "--quiet", "--detach", tree, revision], check=True)
        try:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, tree]
            subprocess.run(install, check=True)
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)
        yield site


def compare(
    revision: str, problems: list[tuple[Case, Mode]], rounds: int
) -> Iterator[dict[str, list[float]] | str]:
    """The race of each problem between this tree and a revision, or why there was none."""
    with built(revision) as site, contextlib.ExitStack() as stack:
        workers = {HERE: Worker(), revision: Worker(site)}
        for worker in workers.values():
            stack.callback(worker.close)
        for case, mode in problems:
            try:
                files = [worker.ask((case.name, mode.name)) for worker in workers.values()]
                assert [Path(file).is_relative_to(site) for file in files] == [False, True], files
                yield race({name: partial(worker.ask, None) for name, worker in workers.items()}, rounds)
            except RuntimeError as error:
                yield str(error)


if __name__ == "__main__":
    serve()

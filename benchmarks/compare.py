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

from .cases import CASES, MODES, Case, Mode
from .contenders import FRESH, OURS, enter
from .problem import Problem
from .timing import race, turn

ROOT = Path(__file__).parents[1]
HERE = "this"


class Worker:
    """A process that runs the gn_fast found in `site`, or this one, on one problem at a time."""

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
        """Send a problem's case and mode, or None for a turn; receive what the process made of it."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """The other side of `Worker.ask`."""
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        try:
            if request is None:
                answer = turn(call)
            else:
                call = None  # lets go of the last problem's memory first
                case, mode = request
                chosen = next(m for m in MODES if m.name == mode)
                name = FRESH if chosen.fresh else OURS
                call = enter(Problem(next(c for c in CASES if c.name == case), chosen), [name])[0][name]
        except Exception as error:  # an older revision need not have everything
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
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


def compare(revision: str, problems: list[tuple[Case, Mode]], rounds: int) -> Iterator[dict[str, list[float]] | str]:
    """The race of each problem between this tree and a revision, or why there was none."""
    with built(revision) as site, contextlib.ExitStack() as stack:
        workers = {HERE: Worker(), revision: Worker(site)}
        for worker in workers.values():
            stack.callback(worker.close)
        for case, mode in problems:
            try:
                for worker in workers.values():
                    worker.ask((case.name, mode.name))
                yield race({name: partial(worker.ask, None) for name, worker in workers.items()}, rounds)
            except RuntimeError as error:
                yield str(error)


if __name__ == "__main__":
    serve()

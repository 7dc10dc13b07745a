"""Another revision of gn_fast, built in a worktree and run in its own process, turn by turn with this one."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .cases import Case, Mode
from .contenders import FRESH, OURS
from .timing import race
from .worker import ROOT, Worker

HERE = "this"


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
    with built(revision) as site, Worker() as here, Worker(site) as there:
        workers = {HERE: here, revision: there}
        for case, mode in problems:
            name = FRESH if mode.fresh else OURS
            try:
                files = [worker.enter(case, mode, [name])[-1] for worker in workers.values()]
                assert [Path(file).is_relative_to(site) for file in files] == [False, True], files
                yield race({of: partial(worker.turn, name) for of, worker in workers.items()}, rounds)
            except RuntimeError as error:
                yield str(error)

"""Tests the installed gn_fast, away from its sources and without a compiler: python -P .ci/test_installed.py

Python is that of a virtual environment with what gn_fast[test] needs. Further arguments are pytest's.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {
    "test_build.py": "builds the sources",
    "test_docs.py": "reads the pages beside the sources",
}
CONFIGURATION = """
import gn_fast, pathlib, sys
gn_fast.show_config()
print(gn_fast.__file__)
sys.exit("these are the sources" if pathlib.Path(gn_fast.__file__).is_relative_to(sys.argv[1]) else 0)
"""


def main(arguments):
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)}
    environment.pop("PYTHONPATH", None)
    for compiler in ("cc", "gcc", "clang"):
        if shutil.which(compiler, path=environment["PATH"]):
            return f"{compiler} is beside {sys.executable}: use a virtual environment"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder, "tests"), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)

        def python(*arguments):
            command = [sys.executable, "-P", *arguments]
            return subprocess.run(command, cwd=folder, env=environment, check=False).returncode

        failed = python("-c", CONFIGURATION, str(ROOT))
        for name, reason in LEFT_OUT.items():
            print(f"left out: {name}, which {reason}", flush=True)
        ignored = [f"--ignore=tests/{name}" for name in LEFT_OUT]
        return failed or python("-m", "pytest", "-q", *ignored, *arguments, "tests", "--pyargs", "gn_fast")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command line: `gn-fast` and `python -m gn_fast`. What a subcommand does lives elsewhere."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from . import demo


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, or 2 for arguments that do not fit."""
    parser = _Parser(prog="gn-fast", description="Group normalization for NumPy arrays.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo.add_command(commands)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

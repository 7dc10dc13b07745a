"""The command line: `gn-fast` and `python -m gn_fast`. What a subcommand does lives in `gn_fast.commands`."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .commands import bench, demo, info, norm
from .commands.terminal import one_line

DESCRIPTION = """\
Group normalization for NumPy arrays.

Exit codes: 0; 1 if the system failed, as when a disk is full; 2 for arguments that do not fit; 128 and the
signal's number if interrupted: 130 by Ctrl-C."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **arguments})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, without the usage


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code; arguments that do not fit exit with 2 at once."""
    parser = _Parser(prog="gn-fast", description=DESCRIPTION, epilog="example:\n  gn-fast norm --help")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (info, demo, bench, norm):
        command.add_command(commands)
    try:
        _run(parser, argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads has read enough
        _forget_output()
        return 141
    except (MemoryError, OSError) as error:
        _forget_output()
        print(f"gn-fast: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    try:
        arguments = parser.parse_args(argv)
        arguments.run(arguments)
    finally:
        sys.stdout.flush()  # here, where it may fail, and not as Python ends


def _forget_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    raise SystemExit(main())

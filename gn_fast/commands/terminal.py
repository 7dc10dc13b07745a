"""What commands share: numbers as arguments, and what they print.

rich draws on a terminal, where it is installed; a pipe gets tables as plain text, and no progress.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Advance = Callable[[int], object]


@contextlib.contextmanager
def blamed(parser: argparse.ArgumentParser, argument: str) -> Iterator[None]:
    """Make an error of the block one line that names the argument, and exit code 2."""
    try:
        yield
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        parser.error(f"argument {argument}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split()) or type(error).__name__


def number_from_1(text: str) -> int:
    """The type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 1 on")
    return int(text)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its numbers to the right of a first column of text."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            _print_rich(title, header, rows)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title, end="\n\n")
    for row in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print(row[0].ljust(widths[0]), *cells, sep="  ")


def _print_rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", style=None if i else "bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A bar on standard error, if that is a terminal and rich is there. The block says how it advances."""
    bar = _bar() if sys.stderr.isatty() else None
    if bar is None:
        yield lambda amount: None
        return
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


def _bar() -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(stderr=True), transient=True)

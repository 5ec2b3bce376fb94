"""Text from strangers' files, made fit for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PIPE_WIDTH = 1000


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def print_table(table: Table) -> None:
    """``table`` on standard output with nothing cut off; in a pipe or file, a row is one line."""
    for column in table.columns:
        column.overflow = "fold"
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    console.print(table)


def print_json(value: Any) -> None:
    """``value`` as JSON on standard output, in ASCII, so that nothing in it steers a terminal."""
    typer.echo(json.dumps(value, indent=1))


def safe(text: Any) -> str:
    """Text from a stranger's file, for a table."""
    return escape(printable(str(text)))


def printable(text: str) -> str:
    """``text`` from a stranger's file without characters that steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)

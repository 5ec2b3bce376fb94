"""Says how far a run has come. Training and evaluation report here and know no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Advance = Callable[[str], None]
"""Call after each piece of work, with a short note (a loss, say) to show beside the bar."""


class Progress(Protocol):
    """Receives the stages of a run, one after the other."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Open a stage of ``total`` pieces of work, or of an unknown number."""

    def say(self, line: str) -> None:
        """Tell people something between two stages."""


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Open a stage that nobody sees."""
        yield lambda note: None

    def say(self, line: str) -> None:
        """Tell nobody."""


class BarProgress:
    """A bar for each stage on ``console``; the finished ones stay."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """Print the line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Show a bar until the stage ends."""
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=total, note="")
            yield lambda note: bars.update(task, advance=1, note=note)
            if total is None:
                bars.update(task, total=1, completed=1)

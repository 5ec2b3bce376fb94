"""Files on their way to a server, with a bar where a person waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from server.cli.errors import console

_WORTH_A_BAR = 4 << 20
"""Bytes below which a file is gone before anybody has read the bar."""


@contextmanager
def shown_progress(file: Path) -> Iterator[Callable[[int], None]]:
    """What to call with the bytes of each piece that was sent."""
    num_bytes = file.stat().st_size
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=num_bytes < _WORTH_A_BAR,
    ) as progress:
        task = progress.add_task(file.name, total=num_bytes)
        yield lambda piece: progress.advance(task, piece)

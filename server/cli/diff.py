"""``reft adapter diff``: what differs between two adapter files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from server.cli.errors import one_line_errors
from server.cli.text import safe


def diff(
    a: Annotated[Path, typer.Argument(help="An adapter file")],
    b: Annotated[Path, typer.Argument(help="Another one")],
    limit: Annotated[int, typer.Option(help="Tensors to list at most", min=1)] = 40,
) -> None:
    """Compare two adapter files: fields of the specs, then tensors."""
    with one_line_errors():
        from reft_core.adapter import read_adapter
        from server.cli.inspection import spec_differences, tensor_differences, tensors_of

        ours, theirs = read_adapter(a), read_adapter(b)
        console = Console()
        if ours.digest == theirs.digest:
            console.print(f"identical files, digest {ours.digest}")
            return
        fields = spec_differences(ours, theirs)
        if fields:
            table = Table("field", "A", "B")
            for name, one, other in fields:
                table.add_row(*(safe(str(cell)) for cell in (name, one, other)))
            console.print(table)
        else:
            console.print("specs are equal")
        tensors = tensor_differences(ours, theirs)
        if tensors:
            table = Table("tensor", "largest |A − B|", "relative")
            for entry in tensors[:limit]:
                if entry.largest is None or entry.relative is None:
                    table.add_row(entry.name, entry.note, "")
                else:
                    table.add_row(entry.name, f"{entry.largest:.3g}", f"{entry.relative:.3g}")
            console.print(table)
        total = len(tensors_of(ours).keys() | tensors_of(theirs).keys())
        more = f", {limit} of them listed" if len(tensors) > limit else ""
        console.print(f"{len(tensors)} of {total} tensors differ{more}")

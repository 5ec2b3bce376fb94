"""What the commands that make adapter files have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reft_core.errors import InvalidRequest

if TYPE_CHECKING:
    from reft_core.adapter import Adapter


def check_free(out: Path, force: bool) -> None:
    """Raise :class:`InvalidRequest` if there is a file at ``out`` that is not to be replaced."""
    if out.exists() and not force:
        raise InvalidRequest.because("out", str(out), "a new file; --force replaces this one")


def write(out: Path, data: bytes, *, by_method: bool = False) -> Adapter:
    """Write an adapter file and say so, with its description or its method."""
    from reft_core.adapter import decode_adapter, write_durably

    write_durably(out, data)
    adapter = decode_adapter(data)
    spec = adapter.spec
    typer.echo(
        f"{spec.name}: {spec.method if by_method else spec.description}; "
        f"{spec.num_parameters:,} parameters, {len(data):,} bytes in {out} ({adapter.digest})"
    )
    return adapter


def layer_numbers(text: str, allowed: str) -> tuple[int, ...]:
    """The layers in a list with commas, ascending. Raises :class:`InvalidRequest`."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise InvalidRequest.because("layers", text, allowed) from None

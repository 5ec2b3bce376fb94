"""``reft adapter mix``: several adapter files into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_core.errors import InvalidRequest
from server.cli.errors import one_line_errors
from server.cli.files import check_free, write
from server.cli.options import Force

if TYPE_CHECKING:
    from reft_core.mix import Ingredient


def mix(
    parts: Annotated[
        list[str],
        typer.Argument(
            help="Adapter files in the order they act, each with a strength if it is not the "
            "file's own: a.safetensors:0.7 b.safetensors"
        ),
    ],
    out: Annotated[Path, typer.Option(help="The adapter file to write")],
    name: Annotated[str | None, typer.Option(help="Its name; default: that of --out")] = None,
    force: Force = False,
) -> None:
    """Write one adapter that equals a stack of several, exactly, or say why there is none."""
    with one_line_errors():
        from reft_core.mix import mix as mix_to_file

        check_free(out, force)
        write(out, mix_to_file([_ingredient(part) for part in parts], name or out.stem))


def _ingredient(part: str) -> Ingredient:
    """``FILE`` or ``FILE:STRENGTH``; a file's own strength unless one is given."""
    from reft_core.adapter import read_adapter
    from reft_core.mix import Ingredient

    if Path(part).is_file():
        adapter = read_adapter(Path(part))
        return Ingredient(adapter, adapter.spec.strength)
    file, _, strength = part.rpartition(":")
    if not Path(file).is_file():
        raise InvalidRequest.because("adapter", part, "FILE or FILE:STRENGTH of a file that exists")
    try:
        return Ingredient(read_adapter(Path(file)), float(strength))
    except ValueError:
        raise InvalidRequest.because("strength", strength, f"a number after {file}:") from None

"""``reft adapter convert`` and ``export``: adapters of other libraries to our file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_core.errors import InvalidRequest
from server.cli.errors import console, one_line_errors
from server.cli.files import check_free, layer_numbers, write
from server.cli.options import Force

if TYPE_CHECKING:
    from reft_core.spec import TemplateSpec

_MAX_TEMPLATE_BYTES = 65536
_SOME_LAYERS = "whole numbers such as 8,12"
_BROKEN_ROTATION = 1e-2
"""Entry of RᵀR − I from which a user is told that training broke R."""


def convert(
    source: Annotated[Path, typer.Argument(help="The folder or file another library saved")],
    kind: Annotated[str, typer.Option("--from", help="pyreft, adapters, peft or easysteer")],
    base: Annotated[str, typer.Option(help="Its base model: folder, hub id or 'demo'")],
    out: Annotated[Path, typer.Option(help="The adapter file to write")],
    name: Annotated[str | None, typer.Option(help="The adapter's name")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Edited tokens: f7+l7, l1, prompt or 0,3,-1")
    ] = None,
    tied: Annotated[
        bool | None, typer.Option("--tied/--untied", help="One set of weights for both sides?")
    ] = None,
    anchor: Annotated[str | None, typer.Option(help="prompt_end or before_last")] = None,
    cap: Annotated[str | None, typer.Option(help="On short prompts: shared or half")] = None,
    method: Annotated[str | None, typer.Option(help="A name from `reft methods`")] = None,
    activation: Annotated[
        str | None, typer.Option(help="identity, relu, gelu, silu, tanh, sigmoid")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Such as 8,12; for a source that records none")
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="prompt (PreFT) or all: edit generated tokens too?")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="'base' for its own chat template, or a JSON file with one"),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Names of a classification head's classes: neg,pos")
    ] = None,
    subspaces: Annotated[
        str | None,
        typer.Option(help="Names for ranks that a request may weigh: tone=0:4,topic=4:8"),
    ] = None,
    strength: Annotated[float, typer.Option(help="Its default strength")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Stored as float32, float16, bfloat16")] = "float32",
    description: Annotated[str, typer.Option(help="For people")] = "",
    licence: Annotated[str, typer.Option(help="For people")] = "",
    force: Force = False,
) -> None:
    """Turn another library's adapter into an adapter file. Executes nothing from it.

    What the source does not record is asked for by the name of its option.
    """
    with one_line_errors():
        from reft_core.convert import CONVERTERS, ConvertOptions, base_from_folder
        from reft_core.convert import convert as convert_to_file
        from reft_core.subspaces import parse_subspaces

        if kind not in CONVERTERS:
            raise InvalidRequest.because("from", kind, "one of " + ", ".join(CONVERTERS))
        check_free(out, force)
        given: dict[str, Any] = {
            "name": name,
            "positions": positions,
            "tied": tied,
            "anchor": anchor,
            "cap": cap,
            "method": method,
            "activation": activation,
            "layers": None if layers is None else layer_numbers(layers, _SOME_LAYERS),
            "phase": phase,
            "template": _template(template),
            "labels": None if labels is None else tuple(labels.split(",")),
            "subspaces": None if subspaces is None else parse_subspaces(subspaces),
            "strength": strength,
            "dtype": dtype,
            "description": description,
            "licence": licence,
        }
        data = convert_to_file(source, kind, ConvertOptions(base=base_from_folder(base), **given))
        adapter = write(out, data, by_method=True)
        facts = adapter.spec.training.hyperparameters
        error = facts.get("rotation_error", 0)
        if float(error) > _BROKEN_ROTATION:
            console.print(
                f"note: R is far from orthonormal (RᵀR − I up to {float(error):.2g}); weight decay "
                "on it does that. It is kept as it is, since the other library computes with it.",
                style="yellow",
                soft_wrap=True,
            )
        if facts.get("source_attention") == "eager":
            console.print(
                "note: this is the prefix as `adapters` computes it with eager attention. With "
                "sdpa, its default, it hides some or all of the prefix, and a prefix trained so "
                "will act differently here.",
                style="yellow",
                soft_wrap=True,
            )


def export(
    file: Annotated[Path, typer.Argument(help="An adapter file")],
    kind: Annotated[str, typer.Option("--to", help="peft or pyreft")],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist")],
) -> None:
    """Write an adapter as another library's folder, if it has a form for it."""
    with one_line_errors():
        from reft_core.adapter import read_adapter
        from reft_core.convert import EXPORTERS

        if kind not in EXPORTERS:
            raise InvalidRequest.because("to", kind, "one of " + ", ".join(EXPORTERS))
        if out.exists():
            raise InvalidRequest.because("out", str(out), "a folder that does not exist yet")
        form = EXPORTERS[kind](read_adapter(file), out)
        typer.echo(f"{out}: {form}")


def _template(text: str | None) -> TemplateSpec | str | None:
    """The template option: ``base``, or the template in a JSON file."""
    from reft_core.convert import BASE_TEMPLATE
    from reft_core.spec import TemplateSpec

    if text is None or text == BASE_TEMPLATE:
        return text
    path = Path(text)
    if not path.is_file() or path.stat().st_size > _MAX_TEMPLATE_BYTES:
        raise InvalidRequest.because(
            "template", text, f"{BASE_TEMPLATE!r} or a small JSON file with system, user, …"
        )
    return TemplateSpec.model_validate_json(path.read_bytes())

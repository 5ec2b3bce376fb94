"""EasySteer's training checkpoint: a payload with its layer, prompt template and position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft_core.adapter import EditKey
from reft_core.convert.easysteer.payload import read_payload
from reft_core.convert.options import ConvertOptions, ask_template, position_spec
from reft_core.convert.reading import field_of, invalid
from reft_core.edits import Edit
from reft_core.spec import PositionSpec, TemplateSpec

CHECKPOINT_FILE = "steering_adapter.json"


def read_checkpoint(
    document: Mapping[str, Any], file: str, options: ConvertOptions
) -> tuple[str, dict[EditKey, Edit], PositionSpec, TemplateSpec | None]:
    """Method and edits of a checkpoint, and the position and template it records."""
    if set(document) != {"version", "config", "payload"} or document["version"] != 1:
        raise invalid(file, "document", sorted(document), "version 1, config and payload")
    config = field_of(document, file, "config", dict, "an object")
    payload = field_of(document, file, "payload", dict, "an object")
    apply = config.get("apply")
    if apply != {"prompt_positions": [-1]}:
        raise invalid(file, "config.apply", apply, "{'prompt_positions': [-1]}")
    options.agreeing("positions", "l1", file)
    options.agreeing("anchor", "prompt_end", file)
    options.agreeing("cap", "shared", file)
    options.agreeing("phase", "prompt", file)
    positions = position_spec("l1", tied=True, anchor="prompt_end", cap="shared")
    method, edits = read_payload(payload, file, options)
    layer = config.get("layer")
    if {key.layer for key in edits} != {layer}:
        raise invalid(file, "config.layer", layer, "the payload's layer")
    template = (
        _template(field_of(config, file, "prompt_template", str, "text with one %s"), file)
        if options.template is None
        else ask_template(options, file)
    )
    return method, edits, positions, template


def _template(text: str, file: str) -> TemplateSpec:
    """EasySteer's ``… %s …`` as our user line; ``%%`` stands for a percent sign there."""
    pieces = _split_format(text)
    if len(pieces) != 2 or "{content}" in text:
        raise invalid(file, "config.prompt_template", text, "text with exactly one %s")
    return TemplateSpec(user="{content}".join(pieces))


def _split_format(text: str) -> list[str]:
    """The literal pieces around each ``%s``; any other conversion gives no pieces."""
    pieces, piece, at = [], "", 0
    while at < len(text):
        if text[at] != "%":
            piece, at = piece + text[at], at + 1
            continue
        directive = text[at : at + 2]
        if directive == "%%":
            piece += "%"
        elif directive == "%s":
            pieces.append(piece)
            piece = ""
        else:
            return []
        at += 2
    return [*pieces, piece]

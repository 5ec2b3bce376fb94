"""EasySteer's files: steering vectors and single-layer LoReFT (EasySteer 312c6d8 and later).

Read are

- a payload as JSON, as sent over HTTP: ``{version, kind, tensors, extra, sha256}`` with base64
  float32 tensors. Kinds ``reft`` (LoReFT), ``direction`` (one vector a layer) and ``lowrank``
  ((h·P₁)·P₂ᵀ); the others are named and refused;
- its training checkpoint, ``steering_adapter.json``: such a payload with layer, prompt template
  and position (always the last prompt token);
- the folder its pyreft fork saves: one ``.bin`` beside ``config.json`` or ``reft_config.json``;
- its GGUF export (and repeng's): tensors ``direction.<layer>``.

Layers count decoder blocks from 0, and the edit acts on a block's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reft_core.adapter import EditKey
from reft_core.convert.assembling import Conventions, Converted, assemble
from reft_core.convert.easysteer.checkpoint import CHECKPOINT_FILE, read_checkpoint
from reft_core.convert.easysteer.folder import read_folder
from reft_core.convert.easysteer.payload import METHOD_OF, read_directions, read_payload
from reft_core.convert.gguf_file import GGUF_MAGIC, read_gguf
from reft_core.convert.options import ConvertOptions, ask_name, ask_positions, ask_template
from reft_core.convert.orthogonal import rotation_facts
from reft_core.convert.reading import list_folder, read_bytes, read_json
from reft_core.convert.tensor_file import TensorFile
from reft_core.edits import Edit
from reft_core.spec import PositionSpec, TemplateSpec

METHODS = frozenset(METHOD_OF.values())
"""The methods an EasySteer file can hold."""

_SOURCE = "an EasySteer file"
_MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
"""Of a payload or a checkpoint, whose tensors are base64 text: far beyond one layer's edit."""


def from_easysteer(source: Path, options: ConvertOptions) -> Converted:
    """The adapter in an EasySteer file or folder, whichever of the four forms it has.

    Needs the options positions, anchor, cap and template unless the source is a training
    checkpoint; layers, if the source records none; and name.
    """
    if source.is_dir():
        files = list_folder(source)
        if CHECKPOINT_FILE in files:
            document = read_json(files[CHECKPOINT_FILE], _MAX_DOCUMENT_BYTES)
            found = read_checkpoint(document, CHECKPOINT_FILE, options)
            return _finish(CHECKPOINT_FILE, options, *found)
        return _finish(source.name, options, *read_folder(files, source, options))
    data = read_bytes(source)
    if data[:4] == GGUF_MAGIC:
        vectors = TensorFile(source.name, read_gguf(data, source.name))
        edits = read_directions(vectors, "direction.", options)
        return _finish(source.name, options, "steering", edits)
    document = read_json(source, _MAX_DOCUMENT_BYTES)
    if "payload" in document:
        return _finish(source.name, options, *read_checkpoint(document, source.name, options))
    return _finish(source.name, options, *read_payload(document, source.name, options))


def _finish(
    file: str,
    options: ConvertOptions,
    method: str,
    edits: Mapping[EditKey, Edit],
    positions: PositionSpec | None = None,
    template: TemplateSpec | None = None,
) -> Converted:
    """Our adapter, with the conventions asked for unless the source gave them."""
    options.agreeing("method", method, _SOURCE)
    options.agreeing("activation", "identity", _SOURCE)
    if positions is None:
        positions = ask_positions(options, 1, _SOURCE)
        template = ask_template(options, _SOURCE)
    conventions = Conventions(
        method=method,
        positions=positions,
        template=template,
        name=ask_name(options, _SOURCE),
        tool="converted from EasySteer",
        file=file,
        phase=options.phase or "prompt",
        facts=rotation_facts(edits.values()) if method == "loreft" else {},
    )
    return assemble(edits, conventions, options)

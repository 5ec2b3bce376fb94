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

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import EditKey
from reft_core.convert.common import (
    Conventions,
    Converted,
    ConvertOptions,
    TensorFile,
    ask_name,
    ask_positions,
    ask_template,
    assemble,
    check_layers,
    field_of,
    find_file,
    invalid,
    list_folder,
    parse_json,
    position_spec,
    read_bytes,
    read_json,
    read_pickle,
    rotation_facts,
)
from reft_core.edits import Edit
from reft_core.errors import AdapterFileInvalid, UnsupportedFeature
from reft_core.spec import PositionSpec, TemplateSpec

CHECKPOINT_FILE = "steering_adapter.json"
CONFIG_FILES = ("reft_config.json", "config.json")

_SOURCE = "an EasySteer file"
_WIRE_KEYS = frozenset({"version", "kind", "tensors", "extra", "sha256"})
_KINDS = ("reft", "direction", "lowrank")
_METHOD_OF = {"reft": "loreft", "direction": "steering", "lowrank": "direft"}
METHODS = frozenset(_METHOD_OF.values())
"""The methods an EasySteer file can hold."""
_GGUF_MAGIC = b"GGUF"
_DIGITS = re.compile(r"\d{1,5}")


def from_easysteer(source: Path, options: ConvertOptions) -> Converted:
    """The adapter in an EasySteer file or folder, whichever of the four forms it has.

    Needs the options positions, anchor, cap and template unless the source is a training
    checkpoint; layers, if the source records none; and name.
    """
    if source.is_dir():
        files = list_folder(source)
        if CHECKPOINT_FILE in files:
            return _from_checkpoint(read_json(files[CHECKPOINT_FILE]), CHECKPOINT_FILE, options)
        return _finish(*_read_folder(files, source, options), options)
    data = read_bytes(source)
    if data[:4] == _GGUF_MAGIC:
        return _finish("steering", _read_gguf(source, options), options)
    document = parse_json(data, source.name)
    if "payload" in document:
        return _from_checkpoint(document, source.name, options)
    return _finish(*_read_payload(document, source.name, options), options)


def _finish(
    method: str,
    edits: Mapping[EditKey, Edit],
    options: ConvertOptions,
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
        phase=options.phase or "prompt",
        facts=rotation_facts(edits.values()) if method == "loreft" else {},
    )
    return assemble(edits, conventions, options)


def _from_checkpoint(document: Mapping[str, Any], file: str, options: ConvertOptions) -> Converted:
    """A training checkpoint, which records position and template as well."""
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
    method, edits = _read_payload(payload, file, options)
    layer = config.get("layer")
    if {key.layer for key in edits} != {layer}:
        raise invalid(file, "config.layer", layer, "the payload's layer")
    template = (
        _template(field_of(config, file, "prompt_template", str, "text with one %s"), file)
        if options.template is None
        else ask_template(options, file)
    )
    return _finish(method, edits, options, positions, template)


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


# -- payloads ----------------------------------------------------------------------------------


def _read_payload(
    wire: Mapping[str, Any], file: str, options: ConvertOptions
) -> tuple[str, dict[EditKey, Edit]]:
    """Method and edits of a payload, its digest checked."""
    if set(wire) != _WIRE_KEYS or wire["version"] != 1:
        raise invalid(file, "payload", sorted(wire), "version 1 with " + ", ".join(_WIRE_KEYS))
    kind = wire["kind"]
    if kind not in _KINDS:
        raise UnsupportedFeature.because(f"{file}: kind", kind, "one of " + ", ".join(_KINDS))
    extra = field_of(wire, file, "extra", dict, "an object")
    entries = field_of(wire, file, "tensors", dict, "an object of tensors")
    raw = {name: _entry(entry, file, name) for name, entry in entries.items()}
    _check_digest(wire, raw, extra, file)
    tensors = TensorFile(
        file,
        {
            name: torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
            for name, (shape, data) in raw.items()
        },
    )
    recorded = extra.get("layer")
    if recorded is not None and type(recorded) is not int:
        raise invalid(file, "extra.layer", recorded, "a whole number or null")
    read = {"reft": _read_reft, "lowrank": _read_lowrank}.get(kind)
    if read is None:
        edits = _read_directions(tensors, "layer.", options)
    else:
        edit = read(tensors, options.base.hidden_size)
        edits = _at_layers(edit, recorded, options, file)
    tensors.finish()
    return _METHOD_OF[kind], edits


def _entry(entry: Any, file: str, name: str) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes of one tensor of a payload."""
    if not isinstance(entry, dict) or set(entry) != {"shape", "data"}:
        raise invalid(file, f"tensors.{name}", type(entry).__name__, "an object of shape and data")
    shape, text = entry["shape"], entry["data"]
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise invalid(file, f"tensors.{name}.shape", shape, "a list of positive whole numbers")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise invalid(file, f"tensors.{name}.data", str(error), "base64 text") from None
    size = 4
    for n in shape:
        size *= n
    if len(data) != size:
        raise invalid(file, f"tensors.{name}.data", f"{len(data)} bytes", f"{size} bytes")
    return tuple(shape), data


def _check_digest(
    wire: Mapping[str, Any],
    raw: Mapping[str, tuple[tuple[int, ...], bytes]],
    extra: Mapping[str, Any],
    file: str,
) -> None:
    """Compare ``sha256`` with the payload's content, hashed as EasySteer hashes it."""
    digest = hashlib.sha256(f"{wire['kind']}:1".encode())
    for name in sorted(raw):
        shape, data = raw[name]
        digest.update(name.encode() + str(shape).encode() + data)
    for key in sorted(extra):
        digest.update(f"{key}={extra[key]!r}".encode())
    if wire["sha256"] != digest.hexdigest():
        raise invalid(file, "sha256", wire["sha256"], f"{digest.hexdigest()}, of its content")


def _read_reft(tensors: TensorFile, d: int) -> Edit:
    r = tensors.shape("rotate_layer", 2, f"a ({d}, r) tensor")[1]
    weight = tensors.take("learned_source_weight", (r, d))
    bias = tensors.take("learned_source_bias", (r,)) if "learned_source_bias" in tensors else None
    return _loreft(tensors, tensors.take("rotate_layer", (d, r)), weight, bias)


def _loreft(tensors: TensorFile, rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Edit:
    """LoReFT's edit; EasySteer too computes with R as stored."""
    bias = torch.zeros(rotation.shape[1]) if bias is None else bias
    return Edit(down=weight.mT, skip=rotation, up=rotation.mT, bias=bias)


def _read_lowrank(tensors: TensorFile, d: int) -> Edit:
    r = tensors.shape("projector1", 2, f"a ({d}, r) tensor")[1]
    return Edit(
        down=tensors.take("projector1", (d, r)),
        up=tensors.take("projector2", (d, r)).mT,
        bias=torch.zeros(r),
    )


def _read_directions(
    tensors: TensorFile, prefix: str, options: ConvertOptions
) -> dict[EditKey, Edit]:
    """One vector a layer, from names such as ``layer.8``."""
    options.not_used(("layers",), "the vectors record their layers")
    edits = {}
    for name in tensors.keys:
        digits = name.removeprefix(prefix)
        if not name.startswith(prefix) or not _DIGITS.fullmatch(digits):
            raise invalid(tensors.file, "keys", name, f"{prefix}<layer>")
        check_layers([int(digits)], options.base, tensors.file)
        vector = tensors.take(name, (options.base.hidden_size,))
        edits[EditKey(int(digits), "block_output", 0)] = Edit(shift=vector)
    if not edits:
        raise invalid(tensors.file, "keys", [], f"at least one {prefix}<layer>")
    return edits


def _at_layers(
    edit: Edit, recorded: int | None, options: ConvertOptions, file: str
) -> dict[EditKey, Edit]:
    """The edit at its recorded layer, or at those of the option."""
    if recorded is not None:
        options.agreeing("layers", (recorded,), file)
        layers: tuple[int, ...] = (recorded,)
    else:
        layers = options.required("layers", "the layers to edit", f"{file} records no layer")
    check_layers(layers, options.base, file)
    return {EditKey(layer, "block_output", 0): edit for layer in layers}


# -- folders and GGUF --------------------------------------------------------------------------


def _read_folder(
    files: Mapping[str, Path], source: Path, options: ConvertOptions
) -> tuple[str, dict[EditKey, Edit]]:
    """The one unit in a folder that EasySteer's pyreft fork saved.

    Its loader recognises LoReFT by ``rotate_layer`` and takes a lone vector as a direction.
    """
    config = read_json(find_file(files, *CONFIG_FILES, source=source))
    pickles = sorted(name for name in files if name.endswith(".bin"))
    if len(pickles) != 1:
        raise AdapterFileInvalid(
            f"{source}: got {pickles}, expected exactly one .bin file (kind 'pyreft' reads more)",
            field="source",
        )
    layer = _recorded_layer(config, pickles[0])
    tensors = read_pickle(files[pickles[0]])
    d = options.base.hidden_size
    if "rotate_layer" in tensors:
        r = tensors.shape("rotate_layer", 2, f"a ({d}, r) tensor")[1]
        prefix = "" if "weight" in tensors else "learned_source."
        weight = tensors.take(f"{prefix}weight", (r, d))
        bias = f"{prefix}bias"
        edit = _loreft(
            tensors,
            tensors.take("rotate_layer", (d, r)),
            weight,
            tensors.take(bias, (r,)) if bias in tensors else None,
        )
        method = "loreft"
    else:
        if len(tensors.keys) != 1:
            raise invalid(pickles[0], "keys", tensors.keys, "rotate_layer, or one vector alone")
        edit = Edit(shift=tensors.take(tensors.keys[0], (d,)))
        method = "steering"
    tensors.finish()
    return method, _at_layers(edit, layer, options, pickles[0])


def _recorded_layer(config: Mapping[str, Any], pickle_name: str) -> int | None:
    """The layer of the first representation, or of the file's name; None if neither says."""
    rows = config.get("representations")
    first = rows[0] if isinstance(rows, list) and rows else None
    if isinstance(first, dict):
        first = [first.get("layer"), first.get("component", "block_output")]
    if isinstance(first, list) and first:
        if len(first) > 1 and first[1] != "block_output":
            raise invalid("config", "representations[0]", first[1], "'block_output'")
        if type(first[0]) is int:
            return first[0]
    named = re.match(r"intkey_layer[._](\d{1,5})[._]", pickle_name)
    return int(named[1]) if named else None


def _read_gguf(path: Path, options: ConvertOptions) -> dict[EditKey, Edit]:
    """The vectors of a GGUF control vector; needs the ``gguf`` package to read."""
    try:
        import gguf
    except ImportError:
        raise UnsupportedFeature(
            f"{path.name}: a GGUF file needs the gguf package (pip install gguf)", field="source"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        found = {
            str(tensor.name): torch.from_numpy(tensor.data.copy())
            for tensor in reader.tensors
            if tensor.tensor_type == gguf.GGMLQuantizationType.F32
        }
        others = [str(t.name) for t in reader.tensors if str(t.name) not in found]
    except Exception as error:  # the reader raises whatever a damaged file leads it into
        raise invalid(path.name, "file", f"{type(error).__name__}: {error}", "GGUF") from None
    if others:
        raise invalid(path.name, "tensors", others, "float32 only")
    return _read_directions(TensorFile(path.name, found), "direction.", options)

"""EasySteer's payloads: named tensors of one kind of vector, as JSON with a digest."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import EditKey
from reft_core.convert.assembling import check_layers
from reft_core.convert.options import ConvertOptions
from reft_core.convert.reading import field_of, invalid
from reft_core.convert.tensor_file import TensorFile
from reft_core.edits import Edit
from reft_core.errors import UnsupportedFeature

METHOD_OF = {"reft": "loreft", "direction": "steering", "lowrank": "direft"}
"""Our method's name for each kind of payload that has a form here."""

_WIRE_KEYS = frozenset({"version", "kind", "tensors", "extra", "sha256"})
_MAX_DIMS = 2
"""Of a tensor: all that are read are vectors and matrices."""
_DIGITS = re.compile(r"\d{1,5}")


def read_payload(
    wire: Mapping[str, Any], file: str, options: ConvertOptions
) -> tuple[str, dict[EditKey, Edit]]:
    """Method and edits of a payload, its digest checked."""
    if set(wire) != _WIRE_KEYS or wire["version"] != 1:
        raise invalid(file, "payload", sorted(wire), "version 1 with " + ", ".join(_WIRE_KEYS))
    kind = wire["kind"]
    if kind not in list(METHOD_OF):  # a list, since kind may be unhashable
        raise UnsupportedFeature.because(f"{file}: kind", kind, "one of " + ", ".join(METHOD_OF))
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
        edits = read_directions(tensors, "layer.", options)
    else:
        edit = read(tensors, options.base.hidden_size)
        edits = at_layers(edit, recorded, options, file)
    tensors.finish()
    return METHOD_OF[kind], edits


def _entry(entry: Any, file: str, name: str) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes of one tensor of a payload."""
    if not isinstance(entry, dict) or set(entry) != {"shape", "data"}:
        raise invalid(file, f"tensors.{name}", type(entry).__name__, "an object of shape and data")
    shape, text = entry["shape"], entry["data"]
    sizes = isinstance(shape, list) and len(shape) <= _MAX_DIMS
    if not sizes or not all(type(n) is int and n > 0 for n in shape):
        raise invalid(
            file, f"tensors.{name}.shape", shape, f"at most {_MAX_DIMS} positive whole numbers"
        )
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise invalid(file, f"tensors.{name}.data", str(error), "base64 text") from None
    size = 4 * math.prod(shape)
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
    return loreft_edit(tensors, tensors.take("rotate_layer", (d, r)), weight, bias)


def loreft_edit(tensors: TensorFile, rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Edit:
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


def read_directions(
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


def at_layers(
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

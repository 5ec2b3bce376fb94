"""What a good adapter file is, once more: written from the format's description, and slow.

Nothing here is shared with the reader that it judges. It sees the bytes of a file that the reader
accepted, and what was made of them, and says what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from typing import Any

import numpy as np
import safetensors

from reft_core.adapter import Adapter

Json = dict[str, Any]

_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
_ACTIVATIONS = {"identity", "relu", "gelu", "silu", "tanh", "sigmoid"}
_SITES = re.compile(r"(block_output|attn_output|mlp_output|heads|linear:[A-Za-z0-9_.]{1,128})\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_SIDES = re.compile(r"\s*(?:f(\d{1,5}))?\s*(\+)?\s*(?:l(\d{1,5}))?\s*\Z", re.ASCII)
_MOST_POSITIONS = 4096


class Bad(Exception):
    """The file should have been refused."""


def judge(data: bytes, adapter: Adapter) -> None:
    """Raise :class:`Bad` if the file is no adapter file, or the adapter is not what it says."""
    header, body = _container(data)
    spec = _spec(header.pop("__metadata__", None))
    _library_agrees(data, header)
    dtype, width = _DTYPES[spec["dtype"]]
    expected = _check_spec(spec)
    _need(set(header) == set(expected), "tensors are not those of the spec")
    values = {}
    for name, shape in expected.items():
        entry = header[name]
        _need(set(entry) == {"dtype", "shape", "data_offsets"}, f"{name}: {entry}")
        _need(entry["dtype"] == dtype and entry["shape"] == shape, f"{name}: {entry} is no {shape}")
        begin, end = entry["data_offsets"]
        _need(end - begin == math.prod(shape) * width, f"{name}: {entry}")
        values[name] = _numbers(body[begin:end], dtype).reshape(shape)
        _need(bool(np.isfinite(values[name]).all()), f"{name} is not finite")
    _covers(header, len(body))
    _need(adapter.digest == hashlib.sha256(data).hexdigest(), "another digest")
    _need(adapter.num_bytes == len(data), "another size")
    _says(json.loads(adapter.spec.to_json()), spec, "spec")
    _holds(adapter, values)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise Bad(what)


def _container(data: bytes) -> tuple[Json, bytes]:
    """Header and data, as safetensors describes its format."""
    (length,) = struct.unpack("<Q", data[:8])
    _need(8 + length <= len(data), "a header beyond the file")
    header = _parse(data[8 : 8 + length].decode("utf-8"))
    return header, data[8 + length :]


def _parse(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> Json:
        keys = [key for key, _ in pairs]
        _need(len(keys) == len(set(keys)), f"a key twice in {keys}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _spec(metadata: Any) -> Json:
    _need(isinstance(metadata, dict) and list(metadata) == ["reft"], f"metadata {metadata!r:.80}")
    found = _parse(metadata["reft"])
    _need(isinstance(found, dict), "the spec is no object")
    filled = {"dtype": "float32", "description": "", "strength": 1.0, "sites": {}}
    optional = dict.fromkeys(("prefix", "head", "subspaces", "template"))
    return {**filled, **optional, **found}


def _library_agrees(data: bytes, header: Json) -> None:
    """The format's own library reads the same tensors."""
    read = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    _need(set(read) == set(header), "the library finds other tensors")
    for name, entry in read.items():
        _need(list(entry["shape"]) == header[name]["shape"], f"the library: {name}")


def _covers(header: Json, size: int) -> None:
    """The tensors lie one after the other and leave nothing of the data over."""
    end = 0
    for begin, stop in sorted(entry["data_offsets"] for entry in header.values()):
        _need(begin == end, f"data from {begin} follow {end}")
        end = stop
    _need(end == size, f"data end at {end} of {size}")


def _numbers(raw: bytes, dtype: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    kind = {"F32": "<f4", "F16": "<f2"}[dtype]
    return np.frombuffer(raw, kind).astype(np.float32)


# The spec ---------------------------------------------------------------------------------------


def _whole(value: Any, low: int, high: int, what: str) -> int:
    _need(type(value) is int and low <= value <= high, f"{what}: {value!r:.80}")
    return int(value)


def _check_spec(spec: Json) -> dict[str, list[int]]:
    """The tensors that a spec asks for, with their shapes; everything in it is right."""
    known = {"format_version", "name", "description", "licence", "base", "method", "dtype",
             "positions", "sites", "prefix", "head", "subspaces", "task", "template", "strength",
             "training"}  # fmt: skip
    _need(set(spec) <= known, f"keys {set(spec) - known}")
    _need(bool(_NAME.match(spec["name"])), f"name {spec['name']!r}")
    _need(len(spec["description"]) <= 8192, "description")
    strength = spec["strength"]
    _need(type(strength) in (int, float) and abs(strength) <= 1e6, f"strength {strength!r}")
    base = spec["base"]
    hidden = _whole(base["hidden_size"], 1, 65536, "hidden_size")
    num_layers = _whole(base["num_layers"], 1, 1024, "num_layers")
    _need(bool(re.match(r"[0-9a-f]{64}\Z", base["fingerprint"])), "fingerprint")
    units = _units(spec["positions"])
    ranks, shapes = [], {}
    for site, held in spec["sites"].items():
        _need(bool(_SITES.match(site)), f"site {site!r}")
        ranks.append(_check_site(held, num_layers, hidden))
        for layer in held["layers"]:
            for unit in range(units):
                for part in held["parts"]:
                    name = f"layers.{layer}.{site}.{unit}.{part}"
                    shapes[name] = _shape(held, part, hidden)
    _check_subspaces(spec["subspaces"] or {}, min(ranks, default=0))
    _check_template(spec["template"])
    changes = bool(spec["sites"]) or spec["prefix"] is not None
    _need(changes or spec["head"] is not None, "neither edits nor a head")
    shapes |= _prefix_shapes(spec, num_layers, hidden)
    return shapes | _head_shapes(spec, hidden)


def _units(positions: Json) -> int:
    """How many units a position rule has; the rule is one."""
    rule, tied = positions["rule"].strip(), positions.get("tied", True)
    _need(type(tied) is bool, "tied")
    if rule == "prompt":
        return 1
    if sides := _SIDES.match(rule):
        counts = [int(count) for count in (sides[1], sides[3]) if count]
        _need(len(counts) == (2 if sides[2] else 1), f"positions {rule!r:.80}")
        _need(all(1 <= count <= _MOST_POSITIONS for count in counts), f"positions {rule!r:.80}")
        return 2 if len(counts) == 2 and not tied else 1
    numbers = [int(part) for part in rule.split(",")]  # fails for anything else
    _need(len(set(numbers)) == len(numbers) <= _MOST_POSITIONS, f"positions {rule!r:.80}")
    return 1


def _check_site(held: Json, num_layers: int, hidden: int) -> int:
    """The rank of a site, whose fields go together."""
    layers, parts, rank = held["layers"], held["parts"], _whole(held["rank"], 0, 1024, "rank")
    _need(bool(layers) and layers == sorted(set(layers)), f"layers {layers!r:.80}")
    for layer in layers:
        _whole(layer, 0, num_layers - 1, "layer")
    _need(bool(parts) and len(set(parts)) == len(parts), f"parts {parts!r:.80}")
    _need(set(parts) <= {"down", "skip", "up", "bias", "shift", "gain"}, f"parts {parts!r:.80}")
    is_low_rank = "down" in parts or "up" in parts
    _need(not is_low_rank or {"down", "up"} <= set(parts), f"parts {parts!r:.80}")
    _need(is_low_rank or not {"skip", "bias"} & set(parts), f"parts {parts!r:.80}")
    _need((rank > 0) == is_low_rank, f"rank {rank} with {parts!r:.80}")
    sizes = [held.get(key) or hidden for key in ("in_size", "out_size")]
    _need(rank <= min(_whole(size, 1, 2**20, "size") for size in sizes), f"rank {rank}")
    _need(held.get("activation", "identity") in _ACTIVATIONS, "activation")
    scale = held.get("scale", 1.0)
    _need(type(scale) in (int, float) and abs(scale) <= 1e6, f"scale {scale!r}")
    return rank


def _shape(held: Json, part: str, hidden: int) -> list[int]:
    in_size, out_size = (held.get(key) or hidden for key in ("in_size", "out_size"))
    x_size = in_size if held.get("source") == "input" else out_size
    rank = held["rank"]
    if part in ("down", "skip"):
        return [x_size, rank]
    return {"up": [rank, out_size], "bias": [rank]}.get(part, [out_size])


def _check_subspaces(subspaces: Json, rank: int) -> None:
    owned = [place for ranks in subspaces.values() for place in ranks]
    _need(all(subspaces.values()), "an empty subspace")
    _need(all(type(place) is int and 0 <= place < rank for place in owned), f"subspaces {owned}")
    _need(len(owned) == len(set(owned)), f"subspaces {owned}")


def _check_template(template: Json | None) -> None:
    for role in ("system", "user", "assistant"):
        text = (template or {}).get(role, "{content}")
        _need(text.count("{content}") == 1 and len(text) <= 8192, f"template {text!r:.80}")


def _prefix_shapes(spec: Json, num_layers: int, hidden: int) -> dict[str, list[int]]:
    prefix = spec["prefix"]
    if prefix is None:
        return {}
    _need(spec["strength"] == 1 and spec["head"] is None, "a prefix beside what it excludes")
    length = _whole(prefix["length"], 1, 4096, "prefix length")
    heads = [prefix.get("num_kv_heads"), prefix.get("head_dim")]
    if prefix["kind"] == "embedding":
        _need(heads == [None, None], f"prefix {heads}")
        return {"prefix.embedding": [length, hidden]}
    _need(prefix["kind"] == "kv", "prefix kind")
    shape = [heads[0], length, heads[1]]
    return {f"prefix.{i}.{part}": shape for i in range(num_layers) for part in ("key", "value")}


def _head_shapes(spec: Json, hidden: int) -> dict[str, list[int]]:
    head, task = spec["head"], spec.get("task") or {}
    labels = task.get("labels")
    _need(labels is None or 2 <= len(labels) <= 4096, f"labels {labels!r:.80}")
    kind = task.get("kind", "generation")
    _need(kind in ("generation", "classification", "regression"), f"task {kind!r:.80}")
    _need((head is None) == (kind == "generation"), "head and task")
    _need(kind == "generation" or (labels is None) == (kind == "regression"), "task and labels")
    if head is None:
        return {}
    size = 1 if labels is None else len(labels)
    inner = head.get("hidden")
    shapes = {"head.out.weight": [inner or hidden, size], "head.out.bias": [size]}
    if inner is not None:
        shapes |= {"head.dense.weight": [hidden, inner], "head.dense.bias": [inner]}
    return shapes


# What was made of it ----------------------------------------------------------------------------


def _says(found: Any, declared: Any, where: str) -> None:
    """Whatever the file declares is what was understood; what it leaves out may be anything."""
    if isinstance(declared, dict):
        _need(isinstance(found, dict), where)
        for key, value in declared.items():
            _need(key in found, f"{where}.{key} was lost")
            _says(found[key], value, f"{where}.{key}")
    else:
        _need(found == declared, f"{where}: {found!r:.80} for {declared!r:.80}")


def _holds(adapter: Adapter, values: dict[str, np.ndarray[Any, Any]]) -> None:
    """The adapter holds the file's numbers, each in its place, and no others."""
    held = {
        f"layers.{key.layer}.{key.site}.{key.unit}.{part}": tensor
        for key, edit in adapter.edits.items()
        for part, tensor in edit.parts()
    }
    held |= {} if adapter.prefix is None else adapter.prefix.tensors()
    held |= {} if adapter.head is None else adapter.head.tensors()
    _need(set(held) == set(values), "the adapter holds other tensors")
    for name, tensor in held.items():
        _need(bool(np.array_equal(tensor.numpy(), values[name])), f"{name} holds other numbers")

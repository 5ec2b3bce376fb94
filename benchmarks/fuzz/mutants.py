"""Adapter files damaged at random: in their bytes, their header, their spec, their tensors.

A mutant is a function of a seed and an index alone, so that those two numbers bring it back.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.fuzz.base import good_files

Json = dict[str, Any]

_DEEP = 20_000
_FORM = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
_NUMBERS = [0, 1, -1, 2, 3, 7, 15, 16, 17, 255, 1023, 1024, 1025, 4096, 65536, 2**31, 2**53 + 1,
            2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e-320, 1e6, 1e7, 1e39, 1e308,
            float("nan"), float("inf"), float("-inf")]  # fmt: skip
_TEXTS = ["", "a", "A" * 300, "x" * 9000, "\0", "\n", "../../etc/passwd", "é", "\u202e", "\ud800",
          "\U0001f600", "{content}", "{content}{content}", "{{ 7*7 }}", "{% raw %}", "f1+l1", "l1",
          "f0", "f4096", "f4097", "prompt", "1,-1", "1,1", " f1 + l1 ", "-0", "float32", "F32",
          "F64", "I8", "block_output", "mlp_output", "heads", "linear:self_attn.q_proj",
          "linear:..", "kv", "embedding", "all", "first", "classification", "loreft",
          "__metadata__", "name\n", "True", "1", "1e400"]  # fmt: skip


class Mutant(NamedTuple):
    """A damaged file."""

    data: bytes
    origin: str
    """Name of the good file it was made of."""
    damage: str
    """What was done, by name."""


class Parts(NamedTuple):
    """A file taken apart: header without the spec, spec, and each tensor's bytes by name."""

    header: Json
    spec: Json
    tensors: dict[str, bytes]


def mutant(seed: int, index: int) -> Mutant:
    """The mutant of these numbers."""
    draw = random.Random(f"{seed}:{index}")
    goods = good_files()
    good = draw.choice(goods)
    damage = draw.choice(_DAMAGES)
    data = damage(draw, good.data)
    names = [damage.__name__]
    while draw.random() < 0.15:
        more = draw.choice(_BYTE_DAMAGES)
        data = more(draw, data)
        names.append(more.__name__)
    return Mutant(data, good.name, "+".join(name.lstrip("_") for name in names))


def take_apart(data: bytes) -> Parts:
    """The parts of a good file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    spec = json.loads(header.pop("__metadata__")["reft"])
    body = data[8 + length :]
    tensors = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}
    return Parts(header, spec, tensors)


def put_together(header: Json, spec: object, body: bytes) -> bytes:
    """A file of these parts, whatever they are."""
    text = spec if isinstance(spec, str) else json.dumps(spec)
    return frame(json.dumps({"__metadata__": {"reft": text}, **header}).encode(), body)


def frame(header: bytes, body: bytes) -> bytes:
    """A file with this header and tensor data."""
    return struct.pack("<Q", len(header)) + header + body


def repacked(spec: Json, tensors: dict[str, tuple[list[int], bytes]]) -> bytes:
    """A file whose tensors lie one after the other, of the dtype that its spec declares."""
    dtype = _FORM.get(str(spec.get("dtype")), ("F32", 4))[0]
    header, body = {}, b""
    for name, (shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    return put_together(header, spec, body)


# Bytes ------------------------------------------------------------------------------------------


def _place(draw: random.Random, data: bytes) -> int:
    """Somewhere in the length, the header or the data, each as likely."""
    header_end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    low, high = draw.choice([(0, min(8, len(data))), (8, header_end), (header_end, len(data))])
    return draw.randrange(low, high) if low < high else 0


def _flipped(draw: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(draw.randint(1, 8) if found else 0):
        place = _place(draw, data)
        found[place] ^= 1 << draw.randrange(8) if draw.random() < 0.5 else draw.randrange(1, 256)
    return bytes(found)


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[
        : draw.choice([draw.randrange(len(data) + 1), max(0, len(data) - draw.randint(1, 16))])
    ]


def _spliced(draw: random.Random, data: bytes) -> bytes:
    place, gone = _place(draw, data) if data else 0, draw.randrange(40)
    return data[:place] + draw.randbytes(draw.randrange(40)) + data[place + gone :]


def _repeated(draw: random.Random, data: bytes) -> bytes:
    place = _place(draw, data) if data else 0
    piece = data[place : place + draw.randint(1, 200)]
    return data[:place] + piece * draw.randint(2, 4) + data[place + len(piece) :]


def _lengthened(draw: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    wrong = draw.choice([0, 1, length - 1, length + 1, len(data) - 8, len(data), 2**20, 2**31,
                         2**63, 2**64 - 1])  # fmt: skip
    return struct.pack("<Q", wrong % 2**64) + data[8:]


def _crossed(draw: random.Random, data: bytes) -> bytes:
    """One file's header before another's data."""
    other = draw.choice(good_files()).data
    end, start = (8 + int.from_bytes(each[:8], "little") for each in (data, other))
    return data[:end] + other[start:]


_BYTE_DAMAGES: list[Callable[[random.Random, bytes], bytes]] = [
    _flipped, _cut, _spliced, _repeated, _lengthened]  # fmt: skip


def damage_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut, added or repeated, of any kind of file."""
    return draw.choice(_BYTE_DAMAGES)(draw, data)


# JSON -------------------------------------------------------------------------------------------


def _any_json(draw: random.Random, depth: int = 0) -> Any:
    """A value that something might stumble over."""
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return draw.choice(_NUMBERS)
    if kind < 4:
        return draw.choice(_TEXTS)
    if kind == 4:
        return draw.choice([None, True, False, [], {}])
    if kind == 5:
        return [_any_json(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        return {draw.choice(_TEXTS): _any_json(draw, depth + 1) for _ in range(draw.randrange(4))}
    return draw.choice([list(range(draw.randrange(5))), [0] * 2000, ["yes", "no"], {"a": [0]}])


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a document with each key in it."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [*((value, key) for key in keys), *(p for key in keys for p in _places(value[key]))]


def damage_json(draw: random.Random, document: Any) -> None:
    """Change, remove or add something, in place."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        places = _places(document)
        if not places:
            return
        held, key = draw.choice(places)
        what = draw.randrange(5)
        if what < 2:
            held[key] = _any_json(draw)
        elif what == 2 and type(held[key]) in (int, float):
            held[key] += draw.choice([-1, 1, 2, 0.5])
        elif what == 3:
            del held[key]
        elif isinstance(held, dict):
            held[draw.choice([*_TEXTS, f"{key} ", str(key).upper()])] = held[key]
        else:
            held.append(held[key])


def _spec_damaged(draw: random.Random, data: bytes) -> bytes:
    header, spec, _ = take_apart(data)
    damage_json(draw, spec)
    return put_together(header, spec, _body(data))


def _header_damaged(draw: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    damage_json(draw, header)
    return frame(json.dumps(header).encode(), _body(data))


def _bombed(draw: random.Random, data: bytes) -> bytes:
    """Text that costs much to read, in the header or in the spec."""
    bomb = draw.choice(["[" * _DEEP, '{"a":' * _DEEP, "[" * _DEEP + "]" * _DEEP, "9" * 5000,
                        '"' + "\\u0041" * 5000 + '"', " " * 100_000, "1e" + "9" * 400])  # fmt: skip
    header, spec, _ = take_apart(data)
    if draw.random() < 0.5:
        text = json.dumps(spec)[:-1] + f', "x": {bomb}}}'
        return put_together(header, text, _body(data))
    text = json.dumps({"__metadata__": {"reft": json.dumps(spec)}, **header})[:-1]
    return frame(f'{text}, "x": {bomb}}}'.encode(), _body(data))


def _doubled(draw: random.Random, data: bytes) -> bytes:
    """A key twice: of the header, the metadata or the spec."""
    header, spec, _ = take_apart(data)
    spec_text, level = json.dumps(spec), draw.randrange(3)
    if level == 0:
        key = draw.choice(list(spec))
        spec_text = f"{spec_text[:-1]}, {json.dumps(key)}: {json.dumps(_any_json(draw))}}}"
    metadata = f'"__metadata__": {{"reft": {json.dumps(spec_text)}'
    if level == 1:
        metadata += f', "reft": {json.dumps(spec_text)}'
    metadata += "}"
    key = "__metadata__" if draw.random() < 0.5 else draw.choice(list(header))
    entries = [metadata, *(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in header.items())]
    if level == 2:
        value = header.get(key, {"reft": spec_text})
        entries.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return frame(("{" + ", ".join(entries) + "}").encode(), _body(data))


def _restyled(draw: random.Random, data: bytes) -> bytes:
    """The same JSON written otherwise, which is harmless."""
    header, spec, _ = take_apart(data)
    names = list(header)
    draw.shuffle(names)
    text = json.dumps(spec, indent=draw.choice([None, 1, 4]), ensure_ascii=draw.random() < 0.5)
    document = {"__metadata__": {"reft": text}, **{name: header[name] for name in names}}
    raw = json.dumps(document, ensure_ascii=draw.random() < 0.5).encode()
    return frame(raw + b" " * draw.randrange(9), _body(data))


# Tensors ----------------------------------------------------------------------------------------


def _body(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]


def _entry_damaged(draw: random.Random, data: bytes) -> bytes:
    """Dtype, shape or place of a tensor is another than it is."""
    header, spec, _ = take_apart(data)
    entry = header[draw.choice(list(header))]
    other = header[draw.choice(list(header))]
    what = draw.randrange(6)
    if what == 0:
        entry["dtype"] = draw.choice(["F16", "BF16", "F32", "F64", "I64", "BOOL", "F8_E4M3", 7])
    elif what == 1:
        entry["shape"] = draw.choice([entry["shape"][::-1], [*entry["shape"], 1], [], [0],
                                      [-1], [True], [2**62, 4], [1.0]])  # fmt: skip
    elif what == 2:
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif what == 3:
        entry["data_offsets"] = other["data_offsets"]
    elif what == 4:
        begin, end = entry["data_offsets"]
        moved = draw.choice([-4, -1, 1, 4, 2**63, -begin])
        entry["data_offsets"] = draw.choice([[begin + moved, end], [begin, end + moved],
                                             [begin + moved, end + moved],
                                             [end, begin]])  # fmt: skip
    else:
        entry[draw.choice(["note", "", "Shape"])] = 1
    return put_together(header, spec, _body(data))


def _retensored(draw: random.Random, data: bytes) -> bytes:
    """Tensors added, removed, renamed or resized, everything else of the file being consistent."""
    header, spec, tensors = take_apart(data)
    held = {name: (list(header[name]["shape"]), data) for name, data in tensors.items()}
    names = list(held)
    name = draw.choice(names)
    shape, values = held[name]
    what = draw.randrange(5)
    if what == 0:
        del held[name]
    elif what == 1:
        held[draw.choice(["extra", f"{name}2", "", "layers.9.block_output.0.up"])] = held[name]
    elif what == 2:
        del held[name]
        held[name.replace("0", "1", 1) if "0" in name else name + "x"] = (shape, values)
    elif what == 3:
        held[name] = ([2 * shape[0], *shape[1:]], values * 2)
    else:
        held[name] = ([*shape[:-1], 0], b"")
    return repacked(spec, held)


def _revalued(draw: random.Random, data: bytes) -> bytes:
    """Other numbers, some of which are none."""
    size = len(data) - len(_body(data))
    dtype_size = 4 if len(_body(data)) % 4 == 0 else 2
    found = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        place = size + draw.randrange(max(1, len(_body(data)) // dtype_size)) * dtype_size
        bits = draw.choice([0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 1, 0x80000000,
                            0x7F7FFFFF, 0x3F800000, draw.getrandbits(32)])  # fmt: skip
        found[place : place + 4] = struct.pack("<I", bits)
    return bytes(found)


def _resigned(draw: random.Random, data: bytes) -> bytes:
    """A good file with other finite numbers: another adapter, and a good one."""
    header, spec, tensors = take_apart(data)
    size = _FORM[spec["dtype"]][1]
    form = {"float32": "<f", "float16": "<e"}.get(spec["dtype"])
    held = {}
    for name, values in tensors.items():
        count = len(values) // size
        if form is None:
            fresh = b"".join(struct.pack("<f", draw.gauss(0, 1))[2:] for _ in range(count))
        else:
            fresh = b"".join(struct.pack(form, draw.gauss(0, 1)) for _ in range(count))
        held[name] = (list(header[name]["shape"]), fresh)
    spec["description"] = str(draw.random())
    return repacked(spec, held)


def _respecified(draw: random.Random, data: bytes) -> bytes:
    """A spec with a value that may well be right, where the tensors stay as they are."""
    header, spec, _ = take_apart(data)
    changes: list[tuple[str, Any]] = [
        ("name", draw.choice(["a", "a.b-c_d", "a/b", "é", "a" * 96, "a" * 97, "-a", ""])),
        ("strength", draw.choice([0, 1, -1, 0.5, 100, 101, 1e6, 1e7, 1.5])),
        ("description", draw.choice(_TEXTS)),
        ("licence", draw.choice(_TEXTS)),
        ("method", draw.choice(_TEXTS)),
        ("template", draw.choice([None, {}, {"user": "{content}"}, {"user": "x"}])),
        ("task", draw.choice([{"labels": ["a", "b"]}, {"labels": ["a"]}, {"labels": ["a", "a"]},
                              {"kind": "classification", "labels": ["a", "b"]},
                              {"kind": "regression"}])),
        ("subspaces", draw.choice([None, {}, {"a": [0]}, {"a": [0], "b": [0]}, {"a": [5]},
                                   {"a": []}, {"": [1]}])),
        ("head", draw.choice([None, {}, {"hidden": 5}, {"pooling": "mean"}])),
        ("prefix", draw.choice([None, {"kind": "embedding", "length": 3},
                                {"kind": "kv", "length": 3, "num_kv_heads": 1, "head_dim": 8}])),
        ("positions", {"rule": draw.choice(_TEXTS), "tied": draw.random() < 0.5,
                       "anchor": draw.choice(["prompt_end", "before_last"]),
                       "cap": draw.choice(["shared", "half"])}),
    ]  # fmt: skip
    for key, value in draw.sample(changes, draw.choice([1, 1, 2])):
        spec[key] = value
    for site in spec["sites"].values():
        if draw.random() < 0.5:
            key, value = draw.choice(
                [("activation", "gelu"), ("scale", draw.choice(_NUMBERS)), ("source", "input"),
                 ("phase", "all"), ("interchange", True), ("rank", draw.randint(0, 4)),
                 ("layers", draw.choice([[0], [1], [0, 1], [1, 0], [2], []])),
                 ("parts", draw.choice([["down", "up"], ["up", "down"], ["shift"], []])),
                 ("in_size", draw.choice([8, 16, 24])), ("out_size", draw.choice([8, 16]))]
            )  # fmt: skip
            site[key] = value
    if draw.random() < 0.2:
        key = draw.choice(list(spec["base"]))
        spec["base"][key] = draw.choice([1, 3, 17, "a" * 64, "gpt2", "x"])
    return put_together(header, spec, _body(data))


_DAMAGES: list[Callable[[random.Random, bytes], bytes]] = [
    *_BYTE_DAMAGES,
    _crossed,
    _spec_damaged,
    _spec_damaged,
    _header_damaged,
    _bombed,
    _doubled,
    _restyled,
    _entry_damaged,
    _retensored,
    _revalued,
    _resigned,
    _respecified,
    _respecified,
]

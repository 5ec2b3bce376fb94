"""One good adapter file, and ways to damage it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

from reft_core.spec import METADATA_KEY
from tests.factories import random_adapter_bytes, tiny_description

Json = dict[str, Any]


@cache
def good_file() -> bytes:
    """LoReFT of rank 2 in layers 0 and 3, with a prefix and a suffix unit."""
    return random_adapter_bytes(
        tiny_description(), rank=2, layers=[0, 3], positions="f1+l1", tied=False
    )


def unpack(file: bytes) -> tuple[Json, bytes]:
    """Header and tensor data."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def pack(header: Json | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def with_header(change: Callable[[Json], object]) -> bytes:
    """The good file with its header changed."""
    header, data = unpack(good_file())
    change(header)
    return pack(header, data)


def with_spec_text(change: Callable[[str], str]) -> bytes:
    """The good file with the JSON text of its spec changed."""
    header, data = unpack(good_file())
    header["__metadata__"][METADATA_KEY] = change(header["__metadata__"][METADATA_KEY])
    return pack(header, data)


def with_spec(*path: str, value: object) -> bytes:
    """The good file with ``value`` at ``path`` of its spec."""

    def change(text: str) -> str:
        spec = json.loads(text)
        *parents, last = path
        place = spec
        for key in parents:
            place = place[key]
        place[last] = value
        return json.dumps(spec)

    return with_spec_text(change)


def with_data(index: int, bits: int) -> bytes:
    """The good file with one float32 number replaced by a bit pattern."""
    header, data = unpack(good_file())
    return pack(header, data[: 4 * index] + struct.pack("<I", bits) + data[4 * index + 4 :])


BIAS = "layers.0.block_output.0.bias"
DOWN = "layers.0.block_output.0.down"
UP = "layers.0.block_output.0.up"


def with_tensor(name: str, **entry: object) -> bytes:
    """The good file with parts of one tensor's header entry replaced."""
    return with_header(lambda header: header[name].update(entry))


def swap_offsets(one: str, other: str) -> bytes:
    """The good file with each of two tensors where the other's data are declared."""

    def swap(header: Json) -> None:
        first, second = header[one], header[other]
        first["data_offsets"], second["data_offsets"] = (
            second["data_offsets"],
            first["data_offsets"],
        )

    return with_header(swap)

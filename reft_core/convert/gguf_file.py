"""Tensors of a GGUF file, read with every count and length held to the bytes that are there.

The ``gguf`` package is made for files one trusts: it builds an object for each element of an
array, as many as the file says there are, so that fifty bytes keep it busy for ever. What is
read here is little: float32 tensors of a small file. The metadata is stepped over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reft_core.convert.reading import invalid
from reft_core.errors import AdapterFileInvalid

GGUF_MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_MAX_ITEMS = 100_000
"""Metadata entries, strings in arrays and tensors together."""
_MAX_NAME = 1024
_MAX_DIMS = 8
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value, by type."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_FLOAT32 = 0
"""The one type of tensor that is read."""
_ALIGNMENT_KEY = b"general.alignment"
_DEFAULT_ALIGNMENT = 32


class _Cursor:
    """A place in a file's bytes that never moves past their end."""

    def __init__(self, data: bytes, file: str) -> None:
        self._data, self._file = data, file
        self._items_left = _MAX_ITEMS
        self.at = 0

    def bad(self, what: str, value: object, expected: str) -> AdapterFileInvalid:
        """The error for ``what`` holding ``value``."""
        return invalid(self._file, what, value, expected)

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        left = len(self._data) - self.at
        if size > left:
            raise self.bad(what, f"{size} bytes", f"at most the {left} left, in a GGUF file")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, size: int, what: str) -> int:
        """An unsigned number of ``size`` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def count(self, what: str) -> int:
        """How many items follow. What all of them may be together is bounded."""
        found = self.number(8, what)
        self._items_left -= found
        if self._items_left < 0:
            raise self.bad(what, found, f"at most {_MAX_ITEMS} items, in a GGUF file")
        return found

    def text(self, what: str) -> bytes:
        """A string with its length before it."""
        return self.take(self.number(8, what), what)

    def skip_value(self, kind: int) -> None:
        """Step over a metadata value. Arrays of arrays exist on paper only, and are refused."""
        if kind == _STRING:
            self.text("metadata text")
        elif kind in _SIZES:
            self.take(_SIZES[kind], "metadata value")
        elif kind == _ARRAY:
            inner = self.number(4, "array type")
            if inner == _STRING:
                for _ in range(self.count("array length")):
                    self.text("metadata text")
            elif inner in _SIZES:
                self.take(self.number(8, "array length") * _SIZES[inner], "array")
            else:
                raise self.bad("array type", inner, "a number's, or text's, in a GGUF file")
        else:
            raise self.bad("metadata type", kind, "0 to 12, in a GGUF file")


def read_gguf(data: bytes, file: str) -> dict[str, Tensor]:
    """Every tensor of a little-endian GGUF file, by name; all must be float32.

    Raises :class:`AdapterFileInvalid` naming the file and what is wrong in it.
    """
    cursor = _Cursor(data, file)
    if cursor.take(4, "magic") != GGUF_MAGIC:
        raise cursor.bad("magic", data[:4], f"{GGUF_MAGIC!r}")
    version = cursor.number(4, "version")
    if version not in _VERSIONS:
        raise cursor.bad("version", version, "2 or 3, little-endian, in a GGUF file")
    num_tensors, num_values = cursor.count("tensors"), cursor.count("metadata entries")
    alignment = _read_alignment(cursor, num_values)
    places = [_read_place(cursor) for _ in range(num_tensors)]
    start = math.ceil(cursor.at / alignment) * alignment
    found: dict[str, Tensor] = {}
    num_bytes = 0  # of tensors that may lie over one another, as in a file made to fill memory
    for name, shape, kind, offset in places:
        if kind != _FLOAT32:
            raise invalid(file, name, f"type {kind}", "type 0, float32")
        if name in found:
            raise invalid(file, "tensors", name, "each name once")
        num_bytes += 4 * math.prod(shape)
        if num_bytes > len(data):
            raise cursor.bad("tensors", f"{num_bytes} bytes", f"at most the file's {len(data)}")
        cursor.at = min(start + offset, len(data))
        raw = cursor.take(4 * math.prod(shape), name)
        found[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
    return found


def _read_alignment(cursor: _Cursor, num_values: int) -> int:
    """Step over the metadata; the alignment it may hold."""
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(num_values):
        key = cursor.text("metadata key")
        kind = cursor.number(4, "metadata type")
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = cursor.number(4, "alignment")
        else:
            cursor.skip_value(kind)
    if alignment < 1:
        raise cursor.bad("alignment", alignment, "at least 1, in a GGUF file")
    return alignment


def _read_place(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of one tensor."""
    name = cursor.text("tensor name")
    num_dims = cursor.number(4, "dimensions")
    if len(name) > _MAX_NAME or not 1 <= num_dims <= _MAX_DIMS:
        raise cursor.bad("tensor", (name[:64], num_dims), f"a name and 1 to {_MAX_DIMS} dimensions")
    reversed_shape = [cursor.number(8, "shape") for _ in range(num_dims)]
    if not all(reversed_shape):
        raise cursor.bad("shape", reversed_shape, "no dimension of 0")
    kind, offset = cursor.number(4, "tensor type"), cursor.number(8, "offset")
    return name.decode(errors="replace"), tuple(reversed(reversed_shape)), kind, offset

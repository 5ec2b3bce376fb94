"""The header of an adapter file, all it declares checked before a tensor is built.

That is its length, its JSON, the spec in its metadata, and the names, dtypes and shapes of the
tensors, which the spec implies. What is read here may come from a stranger: the cost is that of
the header, whatever it says.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pydantic import ValidationError

from reft_core.errors import AdapterFileInvalid
from reft_core.spec import METADATA_KEY, AdapterSpec

MAX_HEADER_BYTES = 1024 * 1024

_LENGTH_PREFIX_BYTES = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_HEADER_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def read_header(data: bytes) -> dict[str, Any]:
    """The safetensors header as JSON, its length checked against the cap and the file.

    Raises :class:`AdapterFileInvalid`, as all functions here.
    """
    prefix = data[:_LENGTH_PREFIX_BYTES]
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_PREFIX_BYTES:
        raise AdapterFileInvalid.because(
            "body", f"{len(data)} bytes", "a safetensors file, which starts with 8 bytes of length"
        )
    rest = len(data) - _LENGTH_PREFIX_BYTES
    if length > rest:
        raise AdapterFileInvalid.because(
            "header",
            f"{length} bytes",
            f"at most the {rest} bytes that follow in the body; is this a safetensors file?",
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterFileInvalid.because(
            "header", f"{length} bytes", f"at most {MAX_HEADER_BYTES} bytes"
        )
    raw = data[_LENGTH_PREFIX_BYTES : _LENGTH_PREFIX_BYTES + length]
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterFileInvalid(f"header: not valid JSON ({error})", field="header") from None
    if not isinstance(header, dict):
        raise AdapterFileInvalid.because("header", type(header).__name__, "a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object of ``pairs``; readers disagree on repeated keys, so none may repeat."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:100]!r} appears twice")
    return found


def read_spec(metadata: object) -> AdapterSpec:
    """The spec in the safetensors metadata. Errors name the spec's field."""
    if not isinstance(metadata, dict) or set(metadata) != {METADATA_KEY}:
        held = sorted(metadata) if isinstance(metadata, dict) else metadata
        raise AdapterFileInvalid.because(
            "__metadata__", held, f"exactly one key, {METADATA_KEY!r}, holding the spec"
        )
    text = metadata[METADATA_KEY]
    if not isinstance(text, str):
        raise AdapterFileInvalid.because("spec", type(text).__name__, "a JSON document as text")
    try:
        json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterFileInvalid.because("spec", text, f"a JSON document ({error})") from None
    try:
        return AdapterSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(["spec", *(str(part) for part in first["loc"])])
        raise AdapterFileInvalid.because(field, first.get("input"), first["msg"]) from None


def check_tensors_declared(header: dict[str, Any], spec: AdapterSpec) -> None:
    """Every tensor the spec implies, with its dtype and shape, and no other.

    The cost is the header's, however many tensors the spec implies.
    """
    if spec.num_tensors > len(header):
        missing = (entry for entry in spec.iter_tensor_shapes() if entry[0] not in header)
        name, shape = next(missing)
        raise AdapterFileInvalid(f"{name}: missing, expected shape {shape}", field=name)
    expected = spec.tensor_shapes()
    for name in header:
        if name not in expected:
            raise AdapterFileInvalid.because("tensors", name, "only tensors the spec implies")
    for name, shape in expected.items():
        entry = header.get(name)
        if name not in header:
            raise AdapterFileInvalid(f"{name}: missing, expected shape {shape}", field=name)
        if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
            held = sorted(entry) if isinstance(entry, dict) else entry
            raise AdapterFileInvalid.because(
                name, held, "an object with exactly dtype, shape, data_offsets"
            )
        if entry.get("dtype") != _HEADER_DTYPES[spec.dtype]:
            raise AdapterFileInvalid.because(
                f"{name}.dtype", entry.get("dtype"), _HEADER_DTYPES[spec.dtype]
            )
        if entry.get("shape") != list(shape):
            raise AdapterFileInvalid.because(f"{name}.shape", entry.get("shape"), str(list(shape)))

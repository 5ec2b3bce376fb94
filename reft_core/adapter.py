"""The adapter file: one ``.safetensors`` with the spec in its metadata.

Reading is hostile-input code. Everything the header declares is checked before a tensor is
built: size, header length, JSON, spec, tensor names, dtypes and shapes; then values must be
finite. The file's SHA-256, its *digest*, is the adapter's identity everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from reft_core.edits import Activation, Edit, activate
from reft_core.errors import AdapterFileInvalid, AdapterMismatch, AdapterTooLarge, explain
from reft_core.positions import PositionRule
from reft_core.sites import ModelDescription
from reft_core.spec import METADATA_KEY, AdapterSpec, BaseModelSpec, tensor_name

MAX_ADAPTER_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024
_LENGTH_PREFIX_BYTES = 8
_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_HEADER_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class EditKey(NamedTuple):
    """Where one edit of an adapter sits."""

    layer: int
    site: str
    unit: int


@dataclass(frozen=True)
class Prefix:
    """Tensors of the virtual tokens put before the prompt; see :class:`spec.PrefixSpec`."""

    keys: tuple[Tensor, ...] = ()
    """(KH, n, D) a layer, as they stand in the KV store; empty for kind ``embedding``."""
    values: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    """(n, d), or None for kind ``kv``."""

    def tensors(self) -> dict[str, Tensor]:
        """Each tensor by its name in the file."""
        found = {} if self.embedding is None else {"prefix.embedding": self.embedding}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            found |= {f"prefix.{layer}.key": key, f"prefix.{layer}.value": value}
        return found

    def to(self, device: torch.device | str) -> Prefix:
        """The same prefix with its tensors on ``device``."""
        return Prefix(
            tuple(key.to(device) for key in self.keys),
            tuple(value.to(device) for value in self.values),
            None if self.embedding is None else self.embedding.to(device),
        )


@dataclass(frozen=True)
class Head:
    """Tensors of a classification head; see :class:`spec.HeadSpec`."""

    out_weight: Tensor
    """(d or m, L) for L labels."""
    out_bias: Tensor
    """(L,)"""
    dense_weight: Tensor | None = None
    """(d, m), or None without a dense layer."""
    dense_bias: Tensor | None = None
    """(m,), with ``dense_weight``."""
    activation: Activation = "identity"

    def logits(self, pooled: Tensor) -> Tensor:
        """Logits (N, L) of pooled states (N, d), in float32: act(p·W₁ + b₁)·W₂ + b₂."""
        pooled = pooled.float()
        if self.dense_weight is not None and self.dense_bias is not None:
            inner = torch.addmm(self.dense_bias, pooled, self.dense_weight)
            pooled = activate(self.activation, inner)
        return torch.addmm(self.out_bias, pooled, self.out_weight)

    def tensors(self) -> dict[str, Tensor]:
        """Each tensor by its name in the file."""
        found = {"head.out.weight": self.out_weight, "head.out.bias": self.out_bias}
        if self.dense_weight is not None and self.dense_bias is not None:
            found["head.dense.weight"] = self.dense_weight
            found["head.dense.bias"] = self.dense_bias
        return found

    def to(self, device: torch.device | str) -> Head:
        """The same head with its tensors on ``device``."""
        return Head(
            self.out_weight.to(device),
            self.out_bias.to(device),
            None if self.dense_weight is None else self.dense_weight.to(device),
            None if self.dense_bias is None else self.dense_bias.to(device),
            self.activation,
        )


@dataclass(frozen=True)
class Adapter:
    """A validated adapter: spec, edits, and prefix or head if any, in float32. Immutable."""

    spec: AdapterSpec
    edits: Mapping[EditKey, Edit]
    digest: str
    num_bytes: int
    prefix: Prefix | None = None
    head: Head | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes it takes in memory, nearly."""
        return self.spec.resident_bytes(self.num_bytes)

    @property
    def num_virtual_tokens(self) -> int:
        """Positions its prefix takes before the prompt."""
        return 0 if self.spec.prefix is None else self.spec.prefix.length

    @property
    def has_kv_prefix(self) -> bool:
        """Whether its prefix is keys and values, which need no forward of their own."""
        return self.spec.prefix is not None and self.spec.prefix.kind == "kv"

    @cached_property
    def rule(self) -> PositionRule:
        """The prompt positions it edits."""
        return self.spec.positions.to_rule()

    def to(self, device: torch.device | str) -> Adapter:
        """The same adapter folded, with its tensors on ``device``: the form that serves."""
        edits = {key: edit.fold().to(device=device) for key, edit in self.edits.items()}
        prefix = self.prefix and self.prefix.to(device)
        return replace(self, edits=edits, prefix=prefix, head=self.head and self.head.to(device))


def encode_adapter(
    spec: AdapterSpec,
    edits: Mapping[EditKey, Edit],
    prefix: Prefix | None = None,
    head: Head | None = None,
) -> bytes:
    """The file's bytes, holding all tensors in ``spec.dtype``. Equal input, equal bytes.

    The result is read back before it is returned, so what this function writes is what
    :func:`decode_adapter` accepts; raises :class:`AdapterFileInvalid` otherwise.
    """
    dtype = _TORCH_DTYPES[spec.dtype]
    for key, edit in edits.items():
        site = spec.sites.get(key.site)
        if site is None:
            continue  # its tensors are refused below, by name
        held = (edit.activation, edit.scale, edit.source)
        declared = (site.activation, site.scale, site.source)
        if held != declared:
            raise AdapterFileInvalid.because(
                f"edit of layer {key.layer}, {key.site}",
                held,
                f"activation, scale and source as in the spec, {declared}",
            )
    given = {
        tensor_name(key.layer, key.site, key.unit, part): tensor
        for key, edit in edits.items()
        for part, tensor in edit.parts()
    }
    given |= {} if prefix is None else prefix.tensors()
    given |= {} if head is None else head.tensors()
    # Copied because safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in given.items()
    }
    data = safetensors.torch.save(tensors, metadata={METADATA_KEY: spec.to_json()})
    decode_adapter(data)
    return data


def decode_adapter(
    data: bytes, *, max_bytes: int = MAX_ADAPTER_BYTES, digest: str | None = None
) -> Adapter:
    """The adapter in a file's bytes, fully validated.

    ``digest`` is the SHA-256 of ``data`` if the caller has just computed it.

    Raises :class:`AdapterTooLarge` or :class:`AdapterFileInvalid`, naming the field, what it
    held and what was allowed.
    """
    if len(data) > max_bytes:
        raise AdapterTooLarge(
            explain("adapter file", f"{len(data)} bytes", f"at most {max_bytes} bytes"),
            field="body",
        )
    header = _read_header(data)
    spec = _read_spec(header.pop("__metadata__", None))
    _check_tensors_declared(header, spec)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterFileInvalid(
            f"body: not a valid safetensors file ({error})", field="body"
        ) from None
    _check_finite(tensors)
    digest = digest or hashlib.sha256(data).hexdigest()
    edits, prefix = _build_edits(spec, tensors), _build_prefix(spec, tensors)
    return Adapter(spec, edits, digest, len(data), prefix, _build_head(spec, tensors))


def read_adapter(path: Path, *, max_bytes: int = MAX_ADAPTER_BYTES) -> Adapter:
    """The adapter in the file at ``path``; its size is checked before it is read."""
    size = path.stat().st_size
    if size > max_bytes:
        raise AdapterTooLarge(
            explain(str(path), f"{size} bytes", f"at most {max_bytes} bytes"), field="body"
        )
    return decode_adapter(path.read_bytes(), max_bytes=max_bytes)


def write_durably(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` whole or not at all, also across a power cut.

    Temporary file in the same folder, fsync, rename, fsync of the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_fits(spec: AdapterSpec, model: ModelDescription) -> None:
    """Raise :class:`AdapterMismatch` unless ``spec`` was made for ``model``'s shape."""
    for field in BaseModelSpec.model_fields:
        if field == "name":
            continue
        declared, loaded = getattr(spec.base, field), getattr(model, field)
        if declared != loaded:
            raise AdapterMismatch(
                explain(f"base.{field}", declared, f"{loaded!r}, as in the loaded {model.name}"),
                field=f"base.{field}",
            )
    for name, site in spec.sites.items():
        declared_sizes, sizes = site.sizes(spec.base.hidden_size), model.sites.get(name)
        if sizes is None:
            raise AdapterMismatch(
                explain("sites", name, f"one of {', '.join(model.sites)}, as in {model.name}"),
                field=f"sites.{name}",
            )
        if declared_sizes != sizes:
            raise AdapterMismatch(
                explain(f"sites.{name} sizes", declared_sizes, f"{sizes}, as in {model.name}"),
                field=f"sites.{name}",
            )
    if spec.prefix is not None and spec.prefix.kind == "kv":
        declared_heads = (spec.prefix.num_kv_heads, spec.prefix.head_dim)
        heads = (model.num_kv_heads, model.head_dim)
        if declared_heads != heads:
            raise AdapterMismatch(
                explain("prefix heads", declared_heads, f"{heads}, as in {model.name}"),
                field="prefix",
            )


def _read_header(data: bytes) -> dict[str, Any]:
    """The safetensors header as JSON, its length checked against the cap and the file."""
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


def _read_spec(metadata: object) -> AdapterSpec:
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


def _check_tensors_declared(header: dict[str, Any], spec: AdapterSpec) -> None:
    """Every tensor the spec implies, with its dtype and shape, and no other."""
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


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinities, in one pass over all numbers and not one a tensor."""
    joined = torch.cat([tensor.flatten() for tensor in tensors.values()])
    least, greatest = torch.aminmax(joined)  # a NaN anywhere makes both NaN
    if math.isfinite(least) and math.isfinite(greatest):
        return
    name = next(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    raise AdapterFileInvalid.because(name, "NaN or infinity", "finite values only")


def _build_edits(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> dict[EditKey, Edit]:
    """Edits in float32, in the form the file holds; :meth:`Adapter.to` folds them."""
    edits: dict[EditKey, Edit] = {}
    num_units = spec.positions.to_rule().num_units
    for site_name, site in spec.sites.items():
        for layer in site.layers:
            for unit in range(num_units):
                parts = {
                    part: tensors[tensor_name(layer, site_name, unit, part)].float()
                    for part in site.parts
                }
                edits[EditKey(layer, site_name, unit)] = Edit(
                    **parts, activation=site.activation, scale=site.scale, source=site.source
                )
    return edits


def _build_prefix(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Prefix | None:
    """The prefix in float32, if the spec has one."""
    if spec.prefix is None:
        return None
    if spec.prefix.kind == "embedding":
        return Prefix(embedding=tensors["prefix.embedding"].float())
    layers = range(spec.base.num_layers)
    return Prefix(
        tuple(tensors[f"prefix.{layer}.key"].float() for layer in layers),
        tuple(tensors[f"prefix.{layer}.value"].float() for layer in layers),
    )


def _build_head(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Head | None:
    """The classification head in float32, if the spec has one."""
    if spec.head is None:
        return None
    held = {
        name.removeprefix("head.").replace(".", "_"): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith("head.")
    }
    return Head(**held, activation=spec.head.activation)

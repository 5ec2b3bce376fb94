"""The adapter file: one ``.safetensors`` with the spec in its metadata.

Reading is hostile-input code. Everything the header declares is checked before a tensor is
built (:mod:`reft_core.adapter_header`); then values must be finite. The file's SHA-256, its
*digest*, is the adapter's identity everywhere.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from reft_core.adapter_header import check_tensors_declared, read_header, read_spec
from reft_core.edits import Activation, Edit, activate
from reft_core.errors import AdapterFileInvalid, AdapterMismatch, AdapterTooLarge, explain, shown
from reft_core.positions import PositionRule
from reft_core.sites import ModelDescription
from reft_core.spec import METADATA_KEY, AdapterSpec, BaseModelSpec, tensor_name

MAX_ADAPTER_BYTES = 256 * 1024 * 1024
_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    header = read_header(data)
    spec = read_spec(header.pop("__metadata__", None))
    check_tensors_declared(header, spec)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterFileInvalid(
            f"body: not a valid safetensors file ({shown(str(error))})", field="body"
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


def check_same_shape(base: BaseModelSpec, model: ModelDescription) -> None:
    """Raise :class:`AdapterMismatch` unless ``base`` has ``model``'s shape; names do not count."""
    for field in BaseModelSpec.model_fields:
        if field == "name":
            continue
        declared, loaded = getattr(base, field), getattr(model, field)
        if declared != loaded:
            raise AdapterMismatch(
                explain(f"base.{field}", declared, f"{loaded!r}, as in the loaded {model.name}"),
                field=f"base.{field}",
            )


def check_fits(spec: AdapterSpec, model: ModelDescription) -> None:
    """Raise :class:`AdapterMismatch` unless ``spec`` was made for ``model``'s shape."""
    check_same_shape(spec.base, model)
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

"""The adapter file: exact round trips, and every way a hostile file can be wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_core.adapter import (
    MAX_ADAPTER_BYTES,
    MAX_HEADER_BYTES,
    Adapter,
    EditKey,
    Prefix,
    _check_finite,
    check_fits,
    decode_adapter,
    encode_adapter,
    read_adapter,
    write_durably,
)
from reft_core.edits import ACTIVATION_NAMES, Activation, Edit
from reft_core.errors import (
    AdapterError,
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterTooLarge,
)
from reft_core.methods import METHODS
from reft_core.spec import (
    METADATA_KEY,
    AdapterSpec,
    PrefixSpec,
    SiteSpec,
    TemplateSpec,
    TrainingSpec,
)
from tests.factories import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    assert_close,
    make_placement,
    make_spec,
    moved_edits,
    random_adapter_bytes,
    random_prefix_adapter,
    tiny_description,
)

Json = dict[str, Any]

NARROWING = "linear:mlp.down_proj"  # 48 → 32
WIDENING = "linear:mlp.up_proj"  # 32 → 48


def sites_of(method: str) -> tuple[str, ...] | None:
    """None is a method's own; methods on linear maps need to be told."""
    return (NARROWING, WIDENING) if METHODS[method].sites == ("linear",) else None


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


def loreft_edits(
    layers: list[int], *, num_units: int = 1, activation: Activation | None = None
) -> dict[EditKey, Edit]:
    """LoReFT of rank 2 at the block output."""
    placement = make_placement(
        tiny_description(), "loreft", rank=2, layers=layers, activation=activation
    )
    return moved_edits(placement, num_units)


# Round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(dtype: str, method: str) -> None:
    """Tensors come back as their rounding to the stored dtype; the spec comes back equal."""
    placement = make_placement(
        tiny_description(), method, rank=3, layers=[0, 2], sites=sites_of(method)
    )
    spec = make_spec(
        tiny_description(),
        placement=placement,
        method=method,
        positions="f2+l3",
        tied=False,
        dtype=dtype,
        description='„Grüße“ \u2028 \\ " {content}',
        strength=0.5,
        template=TemplateSpec(user="<user>{content}\n", generation="<assistant>"),
        training=TrainingSpec(
            seed=7, data={"rows": 3}, hyperparameters={"lr": 9e-4, "tied": False}, metrics={"f1": 1}
        ),
    )
    edits = moved_edits(placement, num_units=2)
    file = encode_adapter(spec, edits)
    adapter = decode_adapter(file)
    assert adapter.spec == spec
    assert adapter.spec.to_json() == spec.to_json()
    assert adapter.rule == spec.positions.to_rule()
    assert adapter.digest == hashlib.sha256(file).hexdigest()
    assert adapter.num_bytes == len(file)
    assert adapter.prefix is None
    assert adapter.num_virtual_tokens == 0
    assert list(adapter.edits) == list(edits)
    for key, edit in edits.items():
        decoded = adapter.edits[key]
        assert (decoded.activation, decoded.source) == (edit.activation, edit.source)
        for (part, expected), (same_part, found) in zip(
            edit.parts(), adapter.edits[key].parts(), strict=True
        ):
            assert part == same_part
            rounded = expected.to(getattr(torch, dtype)).float()
            assert_close(found, rounded, tolerance=0)


@pytest.mark.parametrize("rank", [1, 2, HIDDEN_SIZE])
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
@pytest.mark.parametrize("method", ["loreft", "direft", "direft_orthonormal"])
def test_every_trained_edit_can_be_stored(method: str, activation: Activation, rank: int) -> None:
    """Also where two parts are views of one tensor, as LoReFT's skip and up are."""
    placement = make_placement(
        tiny_description(), method, activation=activation, rank=rank, layers=[1]
    )
    edits = moved_edits(placement)
    found = decode_adapter(encode_adapter(make_spec(placement.model, placement=placement), edits))
    h = torch.randn(4, HIDDEN_SIZE)
    (edit,) = found.edits.values()
    assert_close(edit.delta(h), edits[EditKey(1, "block_output", 0)].delta(h))


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize(
    ("method", "activation"),
    [(name, activation) for name, cls in METHODS.items() for activation in cls.activations],
)
def test_every_method_can_be_stored_at_its_sites(
    method: str, activation: Activation, rank: int
) -> None:
    """Rank 8 of four heads is the whole width."""
    model = tiny_description()
    placement = make_placement(
        model, method, activation=activation, rank=rank, layers=[1], sites=sites_of(method)
    )
    edits = moved_edits(placement)
    spec = make_spec(model, placement=placement, method=method)
    found = decode_adapter(encode_adapter(spec, edits))
    for key, edit in edits.items():
        in_size, out_size = model.sites[key.site]
        h, x = torch.randn(4, out_size), torch.randn(4, in_size)
        assert_close(found.edits[key].delta(h, x), edit.delta(h, x))
        assert_close(found.to("cpu").edits[key].delta(h, x), edit.delta(h, x))
    assert spec.num_parameters == sum(edit.num_parameters for edit in edits.values())


def test_layers_may_share_an_edit() -> None:
    spec = make_spec(tiny_description(), layers=[0, 1])
    (edit,) = loreft_edits([0]).values()
    edits = {EditKey(layer, "block_output", 0): edit for layer in (0, 1)}
    assert decode_adapter(encode_adapter(spec, edits)).spec == spec


def test_equal_input_gives_equal_bytes() -> None:
    """In whatever order the edits come."""
    spec = make_spec(tiny_description(), positions="f1+l1", tied=False)
    edits = loreft_edits(list(range(NUM_LAYERS)), num_units=2)
    again = dict(reversed([(key, edit.to()) for key, edit in edits.items()]))
    assert encode_adapter(spec, edits) == encode_adapter(spec.model_copy(), again)
    renamed = spec.model_copy(update={"name": "other"})
    assert encode_adapter(renamed, edits) != encode_adapter(spec, edits)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_a_decoded_adapter_encodes_to_its_own_bytes(activation: Activation, scale: float) -> None:
    """Nothing is folded on the way in, and folding applies a scale once."""
    spec = make_spec(tiny_description(), activation=activation, layers=[0])
    site = spec.sites["block_output"].model_copy(update={"scale": scale})
    spec = spec.model_copy(update={"sites": {"block_output": site}})
    edits = loreft_edits([0], activation=activation)
    scaled = {key: replace(edit, scale=scale) for key, edit in edits.items()}
    file = encode_adapter(spec, scaled)
    adapter = decode_adapter(file)
    h = torch.randn(3, HIDDEN_SIZE)
    for key, edit in scaled.items():
        assert adapter.edits[key].scale == scale
        assert_close(adapter.edits[key].delta(h), edit.delta(h))
        served = adapter.to("cpu").edits[key]
        assert served.scale == (scale if activation == "relu" else 1.0)
        assert_close(served.delta(h), edit.delta(h))
    assert encode_adapter(adapter.spec, adapter.edits) == file


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"activation": "relu"}, id="another activation"),
        pytest.param({"scale": 3.0}, id="another scale"),
        pytest.param({"source": "input"}, id="another source"),
    ],
)
def test_encode_refuses_edits_that_compute_something_else(change: Json) -> None:
    """The spec's activation, scale and source are what a reader will apply."""
    spec = make_spec(tiny_description(), layers=[0])
    edits = loreft_edits([0])
    with pytest.raises(AdapterError):
        encode_adapter(spec, {key: replace(edit, **change) for key, edit in edits.items()})


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", math.nan), ("float32", math.inf), ("float16", 1e6)]
)
def test_encode_refuses_values_that_no_reader_accepts(dtype: str, value: float) -> None:
    spec = make_spec(tiny_description(), layers=[0], dtype=dtype)
    edits = loreft_edits([0])
    broken = {key: replace(edit, bias=torch.full((2,), value)) for key, edit in edits.items()}
    with pytest.raises(AdapterFileInvalid, match=rf"{BIAS}: got .*finite"):
        encode_adapter(spec, broken)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bad_number_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    """Between, before and after numbers as large as the dtype holds."""
    most = torch.finfo(dtype).max
    for place in range(7):
        tensors = {
            name: torch.tensor([[most, -most], [0.0, 1.0]], dtype=dtype) for name in ("a", "b")
        }
        _check_finite(tensors)
        tensors["b" if place > 3 else "a"].view(-1)[place % 4] = bad
        with pytest.raises(AdapterFileInvalid, match=f"{'b' if place > 3 else 'a'}: got 'NaN or"):
            _check_finite(tensors)


def test_a_digest_that_is_known_is_not_computed_again() -> None:
    digest = hashlib.sha256(good_file()).hexdigest()
    assert decode_adapter(good_file(), digest=digest).digest == digest
    assert decode_adapter(good_file(), digest="f" * 64).digest == "f" * 64


def test_half_precision_counts_twice_in_memory() -> None:
    sizes = {}
    for dtype in ("float32", "float16", "bfloat16"):
        adapter = decode_adapter(random_adapter_bytes(tiny_description(), dtype=dtype))
        sizes[dtype] = adapter.resident_bytes / adapter.num_bytes
    assert sizes == {"float32": 1, "float16": 2, "bfloat16": 2}


def test_to_moves_the_edits_alone() -> None:
    adapter = decode_adapter(good_file())
    moved = adapter.to("cpu")
    assert (moved.spec, moved.digest, moved.num_bytes) == (
        adapter.spec,
        adapter.digest,
        adapter.num_bytes,
    )
    for key, edit in adapter.edits.items():
        for (_, before), (_, after) in zip(edit.parts(), moved.edits[key].parts(), strict=True):
            assert_close(after, before, tolerance=0)


def test_to_folds_what_it_moves() -> None:
    """The form that serves: no scale, no skip, the same Δ."""
    tensors = {part: torch.randn(32, 2) for part in ("down", "skip")}
    edit = Edit(**tensors, up=torch.randn(2, 32), scale=3.0)
    (key,) = loreft_edits([0])
    site = SiteSpec(layers=(0,), rank=2, parts=("down", "skip", "up"), scale=3.0)
    spec = make_spec(tiny_description()).model_copy(update={"sites": {"block_output": site}})
    adapter = decode_adapter(encode_adapter(spec, {key: edit}))
    served = adapter.to("cpu").edits[key]
    assert adapter.edits[key].skip is not None, "decoding keeps the file's form"
    assert (served.skip, served.scale) == (None, 1.0)
    h = torch.randn(5, 32)
    assert_close(served.delta(h), edit.delta(h))


# Prefixes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("with_edits", [False, True])
def test_prefix_round_trip_is_exact(
    kind: Literal["kv", "embedding"], dtype: str, with_edits: bool
) -> None:
    """Alone and beside edits (mix-and-match adapters are both in one file)."""
    model = tiny_description()
    drawn = random_prefix_adapter(model, kind, length=5)
    assert drawn.prefix is not None
    spec = make_spec(model, layers=[0, 2], dtype=dtype, prefix=drawn.spec.prefix)
    edits = loreft_edits([0, 2])
    if not with_edits:
        spec, edits = spec.model_copy(update={"sites": {}}), {}
    file = encode_adapter(spec, edits, drawn.prefix)
    adapter = decode_adapter(file)
    assert adapter.spec == spec
    assert set(adapter.edits) == set(edits)
    assert adapter.num_virtual_tokens == 5
    assert adapter.has_kv_prefix == (kind == "kv")
    assert adapter.prefix is not None
    expected = drawn.prefix.tensors()
    found = adapter.prefix.tensors()
    moved = adapter.to("cpu").prefix
    assert moved is not None
    assert list(found) == list(expected) == list(moved.tensors())
    assert len(found) == (2 * NUM_LAYERS if kind == "kv" else 1)
    for name, tensor in expected.items():
        rounded = tensor.to(getattr(torch, dtype)).float()
        assert_close(found[name], rounded, tolerance=0)
        assert_close(moved.tensors()[name], rounded, tolerance=0)
    assert encode_adapter(adapter.spec, adapter.edits, adapter.prefix) == file
    numbers = 5 * 2 * 8 * 2 * NUM_LAYERS if kind == "kv" else 5 * HIDDEN_SIZE
    assert spec.num_parameters == numbers + sum(edit.num_parameters for edit in edits.values())


def test_layers_may_share_a_prefixs_tensors() -> None:
    """Also keys with values, and as views of a larger tensor."""
    model = tiny_description()
    spec = random_prefix_adapter(model, "kv").spec
    shared = torch.randn(3, 2, 8).transpose(0, 1)  # (KH, n, D), not contiguous
    prefix = Prefix((shared,) * NUM_LAYERS, (shared,) * NUM_LAYERS)
    decoded = decode_adapter(encode_adapter(spec, {}, prefix)).prefix
    assert decoded is not None
    for tensor in (*decoded.keys, *decoded.values):
        assert_close(tensor, shared, tolerance=0)


def test_a_prefix_and_its_spec_come_together() -> None:
    model = tiny_description()
    kv, embedding = (random_prefix_adapter(model, kind) for kind in ("kv", "embedding"))
    with pytest.raises(AdapterFileInvalid, match=r"prefix\.0\.key: missing"):
        encode_adapter(kv.spec, {})
    with pytest.raises(AdapterFileInvalid, match=r"tensors: got 'prefix\.embedding'"):
        encode_adapter(kv.spec, {}, embedding.prefix)
    with pytest.raises(AdapterFileInvalid, match="only tensors the spec implies"):
        encode_adapter(make_spec(model, layers=[0]), loreft_edits([0]), kv.prefix)
    assert kv.prefix is not None
    short = Prefix(*(tuple(t[:, :2] for t in ts) for ts in (kv.prefix.keys, kv.prefix.values)))
    with pytest.raises(AdapterFileInvalid, match=r"\[2, 2, 8\], expected \[2, 3, 8\]"):
        encode_adapter(kv.spec, {}, short)
    infinite = Prefix(embedding=torch.full((3, HIDDEN_SIZE), math.inf))
    with pytest.raises(AdapterFileInvalid, match=r"prefix\.embedding: got .*finite"):
        encode_adapter(embedding.spec, {}, infinite)


# Hostile files ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A wrong file and what its refusal must say: field, value and what was allowed."""

    name: str
    file: Callable[[], bytes]
    says: tuple[str, ...]


LAYERS = ("sites", "block_output", "layers")
RANK = ("sites", "block_output", "rank")
DEEP = 100_000

BAD_FILES = [
    # Before the header.
    Bad("empty", lambda: b"", ("body", "0 bytes", "safetensors")),
    Bad("7 bytes", lambda: b"1234567", ("body", "7 bytes", "safetensors")),
    Bad(
        "header beyond the file",
        lambda: struct.pack("<Q", 10**9) + b"{}",
        ("header", "1000000000", "2 bytes"),
    ),
    Bad(
        "header of 2^64-1 bytes",
        lambda: b"\xff" * 8 + b"{}",
        ("header", str(2**64 - 1), "2 bytes"),
    ),
    Bad(
        "header over its cap",
        lambda: pack(b" " * (MAX_HEADER_BYTES + 1), b""),
        ("header", f"{MAX_HEADER_BYTES + 1} bytes", f"at most {MAX_HEADER_BYTES} bytes"),
    ),
    # The header.
    Bad("not JSON", lambda: pack(b"{nope}", b""), ("header", "JSON")),
    Bad("not UTF-8", lambda: pack(b'{"\xff": 1}', b""), ("header", "JSON", "0xff")),
    Bad("UTF-16", lambda: pack('{"a": 1}'.encode("utf-16"), b""), ("header", "JSON")),
    Bad("deep nesting", lambda: pack(b"[" * DEEP, b""), ("header", "JSON", "recursion")),
    Bad("a huge number", lambda: pack(b'{"a": ' + b"9" * 5000 + b"}", b""), ("header", "JSON")),
    Bad("a list", lambda: pack(b"[]", b""), ("header", "'list'", "a JSON object")),
    Bad(
        "a repeated key", lambda: pack(b'{"a": 1, "a": 2}', b""), ("header", "JSON", "'a'", "twice")
    ),
    Bad(
        "a repeated key inside",
        lambda: pack(b'{"__metadata__": {"reft": "", "reft": ""}}', b""),
        ("header", "JSON", "'reft'", "twice"),
    ),
    # The metadata.
    Bad(
        "no metadata",
        lambda: with_header(lambda header: header.pop("__metadata__")),
        ("__metadata__", "None", "exactly one key, 'reft'"),
    ),
    Bad(
        "metadata that is no object",
        lambda: with_header(lambda header: header.update(__metadata__=[1])),
        ("__metadata__", "[1]", "exactly one key, 'reft'"),
    ),
    Bad(
        "another metadata key",
        lambda: with_header(lambda header: header["__metadata__"].update(format="pt")),
        ("__metadata__", "['format', 'reft']", "exactly one key, 'reft'"),
    ),
    Bad(
        "a spec that is no text",
        lambda: with_header(lambda header: header["__metadata__"].update(reft={})),
        ("spec", "'dict'", "a JSON document as text"),
    ),
    # The spec's JSON.
    Bad("spec not JSON", lambda: with_spec_text(lambda _: "hey"), ("spec", "'hey'", "JSON")),
    Bad("spec deep", lambda: with_spec_text(lambda _: "[" * DEEP), ("spec", "'[[[", "JSON")),
    Bad("spec a list", lambda: with_spec_text(lambda _: "[]"), ("spec", "[]", "object")),
    Bad(
        "spec with half a surrogate",
        lambda: with_spec_text(lambda _: "\ud800"),
        ("spec", r"'\ud800'"),
    ),
    Bad(
        "spec with a repeated key",
        lambda: with_spec_text(lambda text: text[:-1] + ',"name":"other"}'),
        ("spec", "JSON", "'name'", "twice"),
    ),
    # Unknown and missing keys, at each level.
    *(
        Bad(
            f"unknown key {'.'.join(path)}",
            lambda path=path: with_spec(*path, value=17),
            (".".join(("spec", *path)), "17", "not permitted"),
        )
        for path in [
            ("typo",),
            ("base", "typo"),
            ("positions", "typo"),
            ("sites", "block_output", "typo"),
            ("task", "typo"),
            ("training", "typo"),
        ]
    ),
    Bad(
        "unknown key of a template",
        lambda: with_spec("template", value={"typo": 17}),
        ("spec.template.typo", "17", "not permitted"),
    ),
    Bad(
        "unknown site",
        lambda: with_spec("sites", value={"mlp": {}}),
        ("spec.sites.mlp", "'mlp'", "match pattern", "block_output"),
    ),
    Bad(
        "a linear site with a path that is none",
        lambda: with_spec("sites", value={"linear:../up": {}}),
        ("spec.sites.linear:../up", "'linear:../up'", "match pattern"),
    ),
    Bad(
        "no sites",
        lambda: with_spec("sites", value={}),
        ("spec", "sites: got none", "at least one site or a prefix"),
    ),
    Bad(
        "missing key",
        lambda: with_spec_text(lambda text: text.replace('"method":"loreft",', "")),
        ("spec.method", "required"),
    ),
    # Wrong types, also those that a lenient reader would convert.
    *(
        Bad(
            f"{'.'.join(path)} = {value!r}",
            lambda path=path, value=value: with_spec(*path, value=value),
            (".".join(("spec", *path)), repr(value), allowed),
        )
        for path, value, allowed in [
            (("name",), 5, "string"),
            (("name",), None, "string"),
            (("name",), "no spaces", "match pattern"),
            (("name",), "../up", "match pattern"),
            (("name",), "newline\n", "match pattern"),
            (("format_version",), 2, "1"),
            (("format_version",), "1", "1"),
            (("base",), None, "object"),
            (("base",), [], "object"),
            (("base", "hidden_size"), "32", "integer"),
            (("base", "hidden_size"), 32.0, "integer"),
            (("base", "hidden_size"), True, "integer"),
            (("base", "hidden_size"), 0, "greater than or equal to 1"),
            (("base", "num_layers"), 10**30, "less than or equal to 1024"),
            (("base", "fingerprint"), "F" * 64, "match pattern"),
            (("dtype",), "float64", "'float32', 'float16' or 'bfloat16'"),
            (("positions", "rule"), 1, "string"),
            (("positions", "tied"), "yes", "boolean"),
            (("positions", "tied"), 0, "boolean"),
            (("positions", "anchor"), "end", "'prompt_end' or 'before_last'"),
            (("positions", "cap"), "none", "'shared' or 'half'"),
            ((*LAYERS,), "03", "array"),
            ((*LAYERS,), [], "at least 1 item"),
            ((*RANK,), "2", "integer"),
            ((*RANK,), 1025, "less than or equal to 1024"),
            ((*RANK,), -1, "greater than or equal to 0"),
            (("sites", "block_output", "activation"), "softmax", "'identity', 'relu'"),
            (("sites", "block_output", "phase"), "decode", "'prompt' or 'all'"),
            (("sites", "block_output", "source"), "x", "'output' or 'input'"),
            (("sites", "block_output", "in_size"), 0, "greater than or equal to 1"),
            (("sites", "block_output", "in_size"), "32", "integer"),
            (("sites", "block_output", "out_size"), 2**20 + 1, "less than or equal to 1048576"),
            (("sites", "block_output", "scale"), math.nan, "finite"),
            (("strength",), math.nan, "finite"),
            (("strength",), math.inf, "finite"),
            (("strength",), -math.inf, "finite"),
            (("strength",), 1e7, "less than or equal to 1000000"),
            (("strength",), "1", "number"),
            (("strength",), True, "number"),
            (("task", "kind"), "regression", "'generation'"),
            (("task", "labels"), ["one"], "at least 2 items"),
            (("training", "seed"), "7", "integer"),
            (("training", "seed"), 7.0, "integer"),
            (("description",), [], "string"),
        ]
    ),
    Bad(
        "a layer that is text",
        lambda: with_spec(*LAYERS, value=[0, "3"]),
        ("spec.sites.block_output.layers.1", "'3'", "integer"),
    ),
    Bad(
        "a metric that is NaN",
        lambda: with_spec("training", "metrics", value={"loss": math.nan}),
        ("spec.training.metrics.loss", "nan", "finite"),
    ),
    Bad(
        "an overlong description",
        lambda: with_spec("description", value="x" * 8193),
        ("spec.description", "'xxx", "at most 8192 characters"),
    ),
    # Values that contradict one another.
    Bad(
        "a layer out of range",
        lambda: with_spec(*LAYERS, value=[0, 4]),
        ("spec", "sites.block_output.layers", "4", "at most 3"),
    ),
    *(
        Bad(
            f"layers {layers}",
            lambda layers=layers: with_spec(*LAYERS, value=layers),
            ("spec.sites.block_output", str(layers), "layers must be ascending, unique"),
        )
        for layers in ([-1, 0], [0, 0], [3, 0])
    ),
    Bad(
        "rank 0",
        lambda: with_spec(*RANK, value=0),
        ("spec.sites.block_output", "of rank 0", "a rank of at least 1"),
    ),
    Bad(
        "rank beyond the hidden size",
        lambda: with_spec(*RANK, value=33),
        ("spec", "sites.block_output.rank", "33", "at most the site's width 32"),
    ),
    *(
        Bad(
            f"parts {parts}",
            lambda parts=parts: with_spec("sites", "block_output", "parts", value=parts),
            ("spec.sites.block_output", parts[0], "parts", allowed),
        )
        for parts, allowed in [
            (["down"], "'down' and 'up' come together"),
            (["bias"], "need 'down' and 'up'"),
            (["skip", "shift"], "need 'down' and 'up'"),
            (["shift"], "need 'down' and 'up'"),  # with rank 2
            (["down", "up", "up"], "unique"),
        ]
    ),
    Bad(
        "unknown part",
        lambda: with_spec("sites", "block_output", "parts", value=["down", "up", "top"]),
        ("spec.sites.block_output.parts.2", "'top'", "'down', 'skip'"),
    ),
    Bad(
        "bad position rule",
        lambda: with_spec("positions", "rule", value="f0"),
        ("spec.positions", "'f0'", "'fN', 'lN'"),
    ),
    Bad(
        "overlong position rule",
        lambda: with_spec("positions", "rule", value="1," * 20_000 + "1"),
        ("spec.positions.rule", "'1,1,", "at most 32768 characters"),
    ),
    Bad(
        "template without content",
        lambda: with_spec("template", value={"user": "hello"}),
        ("spec.template", "'hello'", "'{content}' exactly once"),
    ),
    *(
        Bad(
            f"subspaces {ranks}",
            lambda ranks=ranks: with_spec("subspaces", value={"tone": ranks}),
            ("spec", "subspaces.tone", str(ranks), "ranks 0 to 1"),
        )
        for ranks in ([], [2], [-1, 0])
    ),
    Bad(
        "a prefix of an unknown kind",
        lambda: with_spec("prefix", value={"kind": "token", "length": 1}),
        ("spec.prefix.kind", "'token'", "'kv' or 'embedding'"),
    ),
    Bad(
        "an unknown key of a prefix",
        lambda: with_spec("prefix", value={"kind": "embedding", "length": 1, "typo": 17}),
        ("spec.prefix.typo", "17", "not permitted"),
    ),
    Bad(
        "a prefix whose tensors are absent",
        lambda: with_spec("prefix", value={"kind": "embedding", "length": 2}),
        ("prefix.embedding", "missing", "(2, 32)"),
    ),
    # The tensors.
    Bad(
        "a missing tensor",
        lambda: with_header(lambda header: header.pop(DOWN)),
        (DOWN, "missing", "(32, 2)"),
    ),
    Bad(
        "a tensor too many",
        lambda: with_header(lambda header: header.update({"evil\n": header[DOWN]})),
        ("tensors", r"'evil\n'", "only tensors the spec implies"),
    ),
    Bad(
        "one unit's tensors under a tied rule",
        lambda: with_spec("positions", "tied", value=True),
        ("tensors", "'layers.0.block_output.1.", "only tensors the spec implies"),
    ),
    Bad(
        "an entry that is no object",
        lambda: with_header(lambda header: header.update({DOWN: 5})),
        (DOWN, "5", "object"),
    ),
    Bad(
        "an unknown key in an entry",
        lambda: with_tensor(DOWN, note=17),
        (DOWN, "'note'", "dtype, shape, data_offsets"),
    ),
    Bad("a wrong rank", lambda: with_spec(*RANK, value=3), (f"{DOWN}.shape", "[32, 2]", "[32, 3]")),
    Bad(
        "a transposed shape",
        lambda: with_tensor(DOWN, shape=[2, 32]),
        (f"{DOWN}.shape", "[2, 32]", "[32, 2]"),
    ),
    Bad(
        "a negative shape",
        lambda: with_tensor(DOWN, shape=[-32, 2]),
        (f"{DOWN}.shape", "[-32, 2]", "[32, 2]"),
    ),
    Bad("no shape", lambda: with_tensor(DOWN, shape=None), (f"{DOWN}.shape", "None", "[32, 2]")),
    Bad("a wrong dtype", lambda: with_tensor(DOWN, dtype="F64"), (f"{DOWN}.dtype", "'F64'", "F32")),
    Bad(
        "another dtype than the spec's",
        lambda: with_spec("dtype", value="bfloat16"),
        (".dtype", "'F32'", "BF16"),
    ),
    *(
        Bad(
            f"data_offsets {offsets}",
            lambda offsets=offsets: with_tensor(DOWN, data_offsets=offsets),
            ("body", "not a valid safetensors file"),
        )
        for offsets in ([0, 4], [0, 256], [8, 2**63], [-1, 255], [264, 8], [8.5, 264], None)
    ),
    Bad(
        "offsets of two sizes swapped",
        lambda: swap_offsets(BIAS, DOWN),
        ("body", "not a valid safetensors file"),
    ),
    Bad("truncated data", lambda: good_file()[:-1], ("body", "not a valid safetensors file")),
    Bad("trailing bytes", lambda: good_file() + b"\0", ("body", "not a valid safetensors file")),
    *(
        Bad(
            f"{name} in the data",
            lambda bits=bits: with_data(0, bits),
            (BIAS, "NaN or infinity", "finite values only"),
        )
        for name, bits in [
            ("NaN", 0x7FC00000),
            ("a signalling NaN", 0x7F800001),
            ("infinity", 0x7F800000),
            ("minus infinity", 0xFF800000),
        ]
    ),
]


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.name)
def test_bad_files_are_refused_with_a_reason(bad: Bad) -> None:
    with pytest.raises(AdapterFileInvalid) as caught:
        decode_adapter(bad.file())
    message = str(caught.value)
    missing = [fragment for fragment in bad.says if fragment not in message]
    assert not missing, message
    assert caught.value.field, message


def test_the_good_file_is_good() -> None:
    """Else every refusal above would prove nothing."""
    header, data = unpack(good_file())
    assert decode_adapter(pack(header, data)).spec == decode_adapter(good_file()).spec
    swapped = decode_adapter(swap_offsets(DOWN, UP))
    assert swapped.digest != decode_adapter(good_file()).digest, "equal sizes stay consistent"


@pytest.mark.parametrize("key", ["x" * 100_000, "line\nbreak \x1b[31m"])
def test_messages_neither_flood_nor_forge_a_log(key: str) -> None:
    """A hostile key reaches messages shortened and escaped, as values do."""
    with pytest.raises(AdapterFileInvalid) as caught:
        decode_adapter(with_spec(key, value=1))
    for text in (str(caught.value), caught.value.field or ""):
        assert len(text) < 500
        assert text.isprintable()


def test_size_is_capped_before_anything_is_read() -> None:
    file = good_file()
    assert decode_adapter(file, max_bytes=len(file)).num_bytes == len(file)
    with pytest.raises(AdapterTooLarge) as caught:
        decode_adapter(file, max_bytes=len(file) - 1)
    assert f"{len(file)} bytes" in str(caught.value)
    assert f"at most {len(file) - 1} bytes" in str(caught.value)
    assert caught.value.field == "body"


def test_a_file_over_the_cap_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file: reading its terabyte would end the test in another way."""
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterTooLarge) as caught:
        read_adapter(path)
    assert f"{2**40} bytes" in str(caught.value)
    assert f"at most {MAX_ADAPTER_BYTES} bytes" in str(caught.value)


def test_read_adapter_is_decode_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(good_file())
    assert read_adapter(path).digest == decode_adapter(good_file()).digest
    with pytest.raises(AdapterTooLarge):
        read_adapter(path, max_bytes=len(good_file()) - 1)
    with pytest.raises(FileNotFoundError):
        read_adapter(tmp_path / "absent.safetensors")


def assert_valid(adapter: Adapter, file: bytes) -> None:
    """Whatever was accepted keeps every promise of a decoded adapter."""
    assert adapter.digest == hashlib.sha256(file).hexdigest()
    assert AdapterSpec.model_validate_json(adapter.spec.to_json()) == adapter.spec
    site = adapter.spec.sites["block_output"]
    units = range(adapter.rule.num_units)
    assert set(adapter.edits) == {
        EditKey(layer, "block_output", unit) for layer in site.layers for unit in units
    }
    for edit in adapter.edits.values():
        assert all(tensor.isfinite().all() for _, tensor in edit.parts())
        x = torch.zeros(1, site.sizes(adapter.spec.base.hidden_size)[0])
        h = torch.zeros(1, site.sizes(adapter.spec.base.hidden_size)[1])
        assert edit.delta(h, x).shape == h.shape == (1, HIDDEN_SIZE)


def decode_or_refuse(file: bytes) -> None:
    try:
        adapter = decode_adapter(file, max_bytes=1 << 20)
    except AdapterFileInvalid:  # AdapterTooLarge is one
        return
    assert_valid(adapter, file)


HEADER_END = 8 + struct.unpack("<Q", good_file()[:8])[0]
places = st.integers(0, 7) | st.integers(8, HEADER_END - 1) | st.integers(0, len(good_file()) - 1)


@given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_refused_or_harmless(changes: list[tuple[int, int]]) -> None:
    file = bytearray(good_file())
    for place, value in changes:
        file[place] = value
    decode_or_refuse(bytes(file))


@given(places, st.integers(0, 40), st.binary(max_size=40))
def test_spliced_bytes_are_refused_or_harmless(place: int, cut: int, added: bytes) -> None:
    file = good_file()
    decode_or_refuse(file[:place] + added + file[place + cut :])


SPEC_PATHS = [
    *((key,) for key in AdapterSpec.model_fields),
    *(("base", key) for key in ("name", "hidden_size", "num_layers", "fingerprint")),
    *(("positions", key) for key in ("rule", "tied", "anchor")),
    *(("sites", "block_output", key) for key in SiteSpec.model_fields),
    *(("training", key) for key in ("seed", "data", "hyperparameters", "metrics")),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(SPEC_PATHS), json_values)
def test_any_json_in_the_spec_is_refused_or_harmless(path: tuple[str, ...], value: Any) -> None:
    decode_or_refuse(with_spec(*path, value=value))


# Fitting the model ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "mamba"),
        ("hidden_size", 64),
        ("num_layers", 5),
        ("vocab_size", 97),
        ("fingerprint", "0" * 64),
    ],
)
def test_an_adapter_of_another_model_does_not_fit(field: str, value: object) -> None:
    model = tiny_description()
    spec = decode_adapter(good_file()).spec
    check_fits(spec, model)
    other = spec.model_copy(update={"base": spec.base.model_copy(update={field: value})})
    with pytest.raises(AdapterMismatch) as caught:
        check_fits(other, model)
    assert caught.value.field == f"base.{field}"
    assert str(caught.value).startswith(
        f"base.{field}: got {value!r}, expected {getattr(model, field)!r}"
    )
    assert model.name in str(caught.value)


def test_the_name_of_the_base_model_is_for_people() -> None:
    spec = decode_adapter(good_file()).spec
    renamed = spec.model_copy(update={"base": spec.base.model_copy(update={"name": "a copy"})})
    check_fits(renamed, tiny_description())
    with pytest.raises(AdapterMismatch):
        check_fits(renamed, replace(tiny_description(), hidden_size=33))


@pytest.mark.parametrize(
    ("site", "problem"),
    [
        ("linear:mlp.nope", "sites: got 'linear:mlp.nope', expected one of block_output, "),
        (NARROWING, f"sites.{NARROWING} sizes: got (32, 32), expected (48, 32), as in tiny-llama"),
        (WIDENING, f"sites.{WIDENING} sizes: got (32, 32), expected (32, 48), as in tiny-llama"),
    ],
)
def test_an_adapter_of_other_sites_does_not_fit(site: str, problem: str) -> None:
    """Sites that the model lacks, or has in another width."""
    model = tiny_description()
    spec = make_spec(model)
    moved = spec.model_copy(update={"sites": {site: spec.sites["block_output"]}})
    with pytest.raises(AdapterMismatch) as caught:
        check_fits(moved, model)
    assert caught.value.field == f"sites.{site}"
    assert str(caught.value).startswith(problem)
    right = make_spec(model, sites=(NARROWING, WIDENING))
    check_fits(right, model)


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (2, 16), (2, 7)])
def test_a_prefix_of_other_heads_does_not_fit(heads: int, head_dim: int) -> None:
    model = tiny_description()
    spec = random_prefix_adapter(model, "kv").spec
    check_fits(spec, model)
    prefix = PrefixSpec(kind="kv", length=3, num_kv_heads=heads, head_dim=head_dim)
    with pytest.raises(AdapterMismatch) as caught:
        check_fits(spec.model_copy(update={"prefix": prefix}), model)
    assert caught.value.field == "prefix"
    assert str(caught.value) == (
        f"prefix heads: got ({heads}, {head_dim}), expected (2, 8), as in tiny-llama"
    )


# Writing ----------------------------------------------------------------------------------


def test_write_durably_replaces_whole_files(tmp_path: Path) -> None:
    """Makes folders that are missing, leaves mode 0644 and nothing else."""
    path = tmp_path / "a" / "b" / "file.safetensors"
    for data in (b"first", b"second, longer", b""):
        write_durably(path, data)
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file.safetensors"
    write_durably(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(error)):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_reach_the_disk_before_the_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the file, rename, fsync of the folder."""
    path = tmp_path / "file.safetensors"
    steps: list[str] = []
    fsync, rename = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        steps.append("fsync folder" if stat.S_ISDIR(mode) else "fsync file")
        fsync(descriptor)

    def spy_replace(source: str, target: Path) -> None:
        assert Path(source).read_bytes() == b"data", "all bytes are in the file"
        assert not path.exists()
        steps.append("replace")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_durably(path, b"data")
    assert steps == ["fsync file", "replace", "fsync folder"]


def test_an_empty_edit_set_is_refused() -> None:
    """A file that silently does nothing is worse than none."""
    with pytest.raises(AdapterFileInvalid, match="missing"):
        encode_adapter(make_spec(tiny_description()), {})
    with pytest.raises(AdapterFileInvalid, match="missing"):
        encode_adapter(make_spec(tiny_description()), {EditKey(0, "block_output", 0): Edit()})

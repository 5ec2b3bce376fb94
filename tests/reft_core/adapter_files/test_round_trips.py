"""The adapter file: exact round trips, and what cannot be written."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from reft_core.adapter import EditKey, Prefix, _check_finite, decode_adapter, encode_adapter
from reft_core.edits import ACTIVATION_NAMES, Activation, Edit
from reft_core.errors import AdapterError, AdapterFileInvalid
from reft_core.methods import METHODS
from reft_core.spec import SiteSpec, TemplateSpec, TrainingSpec
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
from tests.reft_core.adapter_files.damage import BIAS, Json, good_file

NARROWING = "linear:mlp.down_proj"  # 48 → 32
WIDENING = "linear:mlp.up_proj"  # 32 → 48


def sites_of(method: str) -> tuple[str, ...] | None:
    """None is a method's own; methods on linear maps need to be told."""
    return (NARROWING, WIDENING) if METHODS[method].sites == ("linear",) else None


def loreft_edits(
    layers: list[int], *, num_units: int = 1, activation: Activation | None = None
) -> dict[EditKey, Edit]:
    """LoReFT of rank 2 at the block output."""
    placement = make_placement(
        tiny_description(), "loreft", rank=2, layers=layers, activation=activation
    )
    return moved_edits(placement, num_units)


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
    with pytest.raises(AdapterFileInvalid, match=r"prefix\.0\.key: missing"):
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


def test_an_empty_edit_set_is_refused() -> None:
    """A file that silently does nothing is worse than none."""
    with pytest.raises(AdapterFileInvalid, match="missing"):
        encode_adapter(make_spec(tiny_description()), {})
    with pytest.raises(AdapterFileInvalid, match="missing"):
        encode_adapter(make_spec(tiny_description()), {EditKey(0, "block_output", 0): Edit()})

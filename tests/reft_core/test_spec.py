"""The spec: exact JSON, what it implies about tensors, and what its fields refuse."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from reft_core.edits import PARTS, Part, Source
from reft_core.positions import PositionRule
from reft_core.spec import (
    MAX_LAYERS,
    MAX_PREFIX,
    MAX_RANK,
    MAX_SIZE,
    AdapterSpec,
    PositionSpec,
    PrefixSpec,
    SiteSpec,
    TaskSpec,
    TemplateSpec,
    TrainingSpec,
    tensor_name,
)
from tests.factories import make_spec, tiny_description

WIDENING, NARROWING = "linear:mlp.up_proj", "linear:mlp.down_proj"  # 32 → 48 → 32


def full_spec() -> AdapterSpec:
    """Every field away from its default, but those of :func:`narrow_spec`."""
    return make_spec(
        tiny_description(),
        name="a-1.b_c",
        method="direft",
        rank=3,
        layers=[1, 3],
        positions="f1+l4",
        tied=False,
        activation="gelu",
        description="naïve “text” {with} \\ 'quotes' and \n newlines",
        licence="CC-BY-4.0",
        dtype="bfloat16",
        task=TaskSpec(labels=("yes", "no")),
        template=TemplateSpec(system="{content} ", user="U {content}", generation="A"),
        prefix=PrefixSpec(kind="kv", length=7, num_kv_heads=2, head_dim=8),
        subspaces={"tone": (0, 2), "topic": (1,)},
        training=TrainingSpec(
            tool="reft 0.1.0",
            command="reft train x.yaml",
            created_at="2026-01-01T00:00:00Z",
            seed=2**40,
            data={"rows": 10, "train": "a.jsonl"},
            hyperparameters={"epochs": 3, "lr": 9e-4, "optimiser": "adamw", "tied": True},
            metrics={"loss": 1 / 3},
        ),
    )


def narrow_spec() -> AdapterSpec:
    """Sites whose input and output differ, that read their input and edit generated tokens.

    Named in the order in which sorted keys bring them back.
    """
    return make_spec(
        tiny_description(),
        method="lora",
        sites=(NARROWING, WIDENING),
        layers=[2],
        strength=-0.1,  # which a prefix, as in full_spec, does not take
    )


@pytest.mark.parametrize("make", [full_spec, narrow_spec, lambda: make_spec(tiny_description())])
def test_json_round_trip_is_exact(make: Callable[[], AdapterSpec]) -> None:
    """Types too: True stays True and 3 stays 3, not 3.0."""
    spec = make()
    text = spec.to_json()
    again = AdapterSpec.model_validate_json(text)
    assert again == spec
    assert again.to_json() == text
    assert repr(again) == repr(spec)


def test_json_is_compact_with_sorted_keys() -> None:
    document = json.loads(full_spec().to_json())
    compact = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert compact == full_spec().to_json()
    assert "“text”" in compact


@pytest.mark.parametrize(
    ("change", "num_tensors", "num_parameters"),
    [
        ({}, 4 * 3, 4 * (32 * 2 * 2 + 2)),
        ({"layers": [2]}, 3, 32 * 2 * 2 + 2),
        ({"layers": [2], "rank": 5}, 3, 32 * 5 * 2 + 5),
        ({"layers": [2], "activation": "relu"}, 4, 32 * 2 * 3 + 2),
        ({"layers": [2], "positions": "f1+l1"}, 3, 32 * 2 * 2 + 2),
        ({"layers": [2], "positions": "f1+l1", "tied": False}, 6, 2 * (32 * 2 * 2 + 2)),
        ({"layers": [2], "positions": "l1", "tied": False}, 3, 32 * 2 * 2 + 2),
    ],
)
def test_tensors_that_a_spec_implies(
    change: dict[str, Any], num_tensors: int, num_parameters: int
) -> None:
    spec = make_spec(tiny_description(), **change)
    assert len(spec.tensor_shapes()) == num_tensors
    assert spec.num_parameters == num_parameters


def test_tensor_names_and_shapes_are_spelt_out() -> None:
    spec = make_spec(
        tiny_description(), layers=[3], positions="f1+l1", tied=False, activation="relu"
    )
    assert spec.tensor_shapes() == {
        "layers.3.block_output.0.down": (32, 2),
        "layers.3.block_output.0.skip": (32, 2),
        "layers.3.block_output.0.up": (2, 32),
        "layers.3.block_output.0.bias": (2,),
        "layers.3.block_output.1.down": (32, 2),
        "layers.3.block_output.1.skip": (32, 2),
        "layers.3.block_output.1.up": (2, 32),
        "layers.3.block_output.1.bias": (2,),
    }
    assert tensor_name(7, "block_output", 1, "gain") == "layers.7.block_output.1.gain"


def test_tensors_of_sites_whose_input_and_output_differ() -> None:
    """down reads the source, up writes the output."""
    assert narrow_spec().tensor_shapes() == {
        f"layers.2.{WIDENING}.0.down": (32, 2),
        f"layers.2.{WIDENING}.0.up": (2, 48),
        f"layers.2.{NARROWING}.0.down": (48, 2),
        f"layers.2.{NARROWING}.0.up": (2, 32),
    }
    sites = narrow_spec().sites
    assert (sites[WIDENING].in_size, sites[WIDENING].out_size) == (None, 48)
    assert (sites[NARROWING].in_size, sites[NARROWING].out_size) == (48, None)
    assert {(site.source, site.phase) for site in sites.values()} == {("input", "all")}
    loreft = make_spec(tiny_description(), sites=(WIDENING,), layers=[2])
    assert loreft.tensor_shapes() == {
        f"layers.2.{WIDENING}.0.down": (48, 2),
        f"layers.2.{WIDENING}.0.up": (2, 48),
        f"layers.2.{WIDENING}.0.bias": (2,),
    }
    assert {(site.source, site.phase) for site in loreft.sites.values()} == {("output", "prompt")}


@pytest.mark.parametrize(
    ("prefix", "tensors"),
    [
        (PrefixSpec(kind="embedding", length=5), {"prefix.embedding": (5, 32)}),
        (
            PrefixSpec(kind="kv", length=5, num_kv_heads=2, head_dim=8),
            {
                f"prefix.{layer}.{part}": (2, 5, 8)
                for layer in range(4)
                for part in ("key", "value")
            },
        ),
    ],
)
def test_tensors_of_a_prefix(prefix: PrefixSpec, tensors: dict[str, tuple[int, ...]]) -> None:
    """Alone, or besides those of the sites."""
    beside = make_spec(tiny_description(), layers=[0], prefix=prefix)
    alone = AdapterSpec.model_validate(beside.model_dump() | {"sites": {}})
    assert alone.tensor_shapes() == tensors
    plain = make_spec(tiny_description(), layers=[0])
    assert beside.tensor_shapes() == plain.tensor_shapes() | tensors
    numbers = sum(math.prod(shape) for shape in tensors.values())
    assert beside.num_parameters == plain.num_parameters + numbers


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("down", (32, 2)),
        ("skip", (32, 2)),
        ("up", (2, 32)),
        ("bias", (2,)),
        ("shift", (32,)),
        ("gain", (32,)),
    ],
)
def test_shape_of_each_part(part: Part, shape: tuple[int, ...]) -> None:
    assert SiteSpec(layers=(0,), rank=2, parts=("down", "up")).shape(part, 32) == shape


@pytest.mark.parametrize(
    ("source", "in_size", "out_size", "x", "h"),
    [
        ("output", None, None, 32, 32),
        ("input", None, None, 32, 32),
        ("output", 48, None, 32, 32),
        ("input", 48, None, 48, 32),
        ("output", None, 16, 16, 16),
        ("input", None, 16, 32, 16),
        ("input", 48, 16, 48, 16),
    ],
)
def test_shapes_follow_source_and_sizes(
    source: Source, in_size: int | None, out_size: int | None, x: int, h: int
) -> None:
    site = SiteSpec(
        layers=(0,),
        rank=2,
        parts=PARTS,
        source=source,
        in_size=in_size,
        out_size=out_size,
    )
    assert site.sizes(32) == (in_size or 32, out_size or 32)
    assert {part: site.shape(part, 32) for part in PARTS} == {
        "down": (x, 2),
        "skip": (x, 2),
        "up": (2, h),
        "bias": (2,),
        "shift": (h,),
        "gain": (h,),
    }


def test_position_spec_is_the_rule_with_its_conventions() -> None:
    spec = PositionSpec(rule="f1+l2", tied=False, anchor="before_last", cap="half")
    assert spec.to_rule() == PositionRule(
        first=1, last=2, tied=False, anchor="before_last", cap="half"
    )


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (SiteSpec, {"layers": (0,), "rank": 0, "parts": ("shift", "gain")}),
        (SiteSpec, {"layers": (0,), "rank": 1, "parts": ("down", "up", "shift")}),
        (SiteSpec, {"layers": (MAX_LAYERS,), "rank": MAX_RANK, "parts": ("down", "up")}),
        (
            SiteSpec,
            {
                "layers": (0,),
                "rank": 1,
                "parts": ("down", "up"),
                "source": "input",
                "phase": "all",
                "in_size": MAX_SIZE,
                "out_size": 1,
            },
        ),
        (PrefixSpec, {"kind": "embedding", "length": 1}),
        (PrefixSpec, {"kind": "kv", "length": MAX_PREFIX, "num_kv_heads": 1, "head_dim": 64}),
        (TemplateSpec, {"user": "{{content}} {x}"}),
        (TaskSpec, {"labels": None}),
    ],
)
def test_accepted(cls: type[BaseModel], fields: dict[str, Any]) -> None:
    document = cls(**fields)
    assert {name: getattr(document, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("cls", "fields", "field", "reason"),
    [
        (SiteSpec, {"layers": (), "rank": 1, "parts": ("down", "up")}, "layers", "at least 1 item"),
        (SiteSpec, {"layers": (0,), "rank": 1, "parts": ()}, "parts", "at least 1 item"),
        (SiteSpec, {"layers": (0,), "rank": 1, "parts": ("down",)}, "", "come together"),
        (SiteSpec, {"layers": (0,), "rank": 1, "parts": ("shift",)}, "", "need 'down'"),
        (SiteSpec, {"layers": (0,), "rank": 0, "parts": ("down", "up")}, "", "rank of at least 1"),
        (SiteSpec, {"layers": (1, 0), "rank": 0, "parts": ("gain",)}, "", "ascending, unique"),
        (SiteSpec, {"layers": (-1,), "rank": 0, "parts": ("gain",)}, "", "at least 0"),
        (SiteSpec, {"layers": (0,), "rank": 0, "parts": ("gain",) * 2}, "", "unique"),
        *(
            (SiteSpec, {"layers": (0,), "rank": 0, "parts": ("gain",)} | wrong, field, reason)
            for wrong, field, reason in [
                ({"source": "both"}, "source", "'output' or 'input'"),
                ({"phase": "decode"}, "phase", "'prompt' or 'all'"),
                ({"in_size": 0}, "in_size", "greater than or equal to 1"),
                ({"out_size": MAX_SIZE + 1}, "out_size", f"less than or equal to {MAX_SIZE}"),
            ]
        ),
        *(
            (PrefixSpec, {"length": 1} | wrong, field, reason)
            for wrong, field, reason in [
                ({"kind": "token"}, "kind", "'kv' or 'embedding'"),
                ({"kind": "embedding", "length": 0}, "length", "greater than or equal to 1"),
                (
                    {"kind": "embedding", "length": MAX_PREFIX + 1},
                    "length",
                    f"less than or equal to {MAX_PREFIX}",
                ),
                ({"kind": "kv"}, "", "which needs both"),
                ({"kind": "kv", "num_kv_heads": 2}, "", "which needs both"),
                ({"kind": "kv", "head_dim": 8}, "", "which needs both"),
                ({"kind": "kv", "num_kv_heads": 0, "head_dim": 8}, "num_kv_heads", "equal to 1"),
                ({"kind": "embedding", "num_kv_heads": 2, "head_dim": 8}, "", "belong to kind"),
                ({"kind": "embedding", "num_kv_heads": 2}, "", "belong to kind 'kv'"),
                ({"kind": "embedding", "head_dim": 8}, "", "belong to kind 'kv'"),
                ({"kind": "embedding", "typo": 1}, "typo", "not permitted"),
            ]
        ),
        (PositionSpec, {"rule": "l0"}, "", "positions: got 'l0'"),
        (TemplateSpec, {"system": "no place"}, "", "system must contain '{content}' exactly once"),
        (TemplateSpec, {"assistant": "{content}{content}"}, "", "assistant must contain"),
        (TaskSpec, {"labels": ("one",)}, "labels", "at least 2 items"),
        (TrainingSpec, {"metrics": {"loss": float("nan")}}, "metrics.loss", "finite"),
        (TrainingSpec, {"data": {str(i): i for i in range(65)}}, "data", "at most 64 items"),
    ],
)
def test_refused(cls: type[BaseModel], fields: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        cls(**fields)
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == field
    assert reason in error["msg"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subspaces": {"a": (0, 2)}}, "subspaces.a: got [0, 2], expected ranks 0 to 1"),
        ({"subspaces": {"a": (0,), "b": ()}}, "subspaces.b: got [], expected ranks 0 to 1"),
        ({"subspaces": {"a": (-1,)}}, "subspaces.a: got [-1], expected ranks 0 to 1"),
        (
            {"subspaces": {"a": (0,)}, "method": "red"},
            "subspaces.a: got [0], expected none: a site has no ranks",
        ),
        (
            {"subspaces": {"a": (0,), "b": (1, 0)}},
            "subspaces: got ranks [0, 1, 0], expected each rank at most once",
        ),
        (
            {"prefix": PrefixSpec(kind="embedding", length=2), "strength": 0.5},
            "strength: got 0.5, expected 1 with a prefix",
        ),
        ({"name": ""}, "match pattern"),
        ({"name": "-x"}, "match pattern"),
        ({"name": "a" * 97}, "match pattern"),
        ({"name": "a\n"}, "match pattern"),
        ({"strength": float("inf")}, "finite"),
        ({"typo": 1}, "not permitted"),
    ],
)
def test_an_adapter_spec_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(reason)):
        make_spec(tiny_description(), **change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"sites": {"block_output": {"layers": [4]}}},
            "sites.block_output.layers: got 4, expected at most 3",
        ),
        (
            {"sites": {"block_output": {"rank": 33}}},
            "sites.block_output.rank: got 33, expected at most the site's width 32",
        ),
        (
            {"sites": {"block_output": {"rank": 17, "out_size": 16}}},
            "sites.block_output.rank: got 17, expected at most the site's width 16",
        ),
        (
            {"sites": {"block_output": {"rank": 9, "in_size": 8}}},
            "sites.block_output.rank: got 9, expected at most the site's width 8",
        ),
        ({"sites": {}}, "sites: got none, expected at least one site, a prefix or a head"),
        (
            {
                "sites": {},
                "prefix": {"kind": "embedding", "length": 1},
                "subspaces": {"a": (0,)},
            },
            "subspaces.a: got [0], expected none: a site has no ranks",
        ),
        ({"sites": {"linear:": {}}}, "match pattern"),
        ({"sites": {"linear:a b": {}}}, "match pattern"),
        ({"sites": {"linear:" + "a" * 129: {}}}, "match pattern"),
        ({"sites": {"lm_head": {}}}, "match pattern"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused(change: dict[str, Any], reason: str) -> None:
    """What a trainer cannot write but a file can say."""
    document = make_spec(tiny_description()).model_dump()
    site = document["sites"]["block_output"]
    sites = {name: site | fields for name, fields in change.get("sites", {}).items()}
    AdapterSpec.model_validate(document)
    with pytest.raises(ValidationError, match=re.escape(reason)):
        AdapterSpec.model_validate(document | change | {"sites": sites})


@pytest.mark.parametrize("change", [{"method": "a\0"}, {"base": {"name": "a\0"}}])
def test_what_a_database_could_not_hold_is_refused(change: dict[str, Any]) -> None:
    fields = full_spec().model_dump()
    fields["base"] |= change.pop("base", {})
    with pytest.raises(ValidationError, match="match pattern"):
        AdapterSpec(**fields | change)


def test_a_spec_is_frozen() -> None:
    spec = full_spec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]

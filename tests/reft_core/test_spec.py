"""The spec: exact JSON, what it implies about tensors, and what its fields refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from reft_core.edits import Part
from reft_core.positions import PositionRule
from reft_core.spec import (
    MAX_LAYERS,
    MAX_RANK,
    AdapterSpec,
    PositionSpec,
    SiteSpec,
    TaskSpec,
    TemplateSpec,
    TrainingSpec,
    tensor_name,
)
from tests.factories import make_spec, tiny_description


def full_spec() -> AdapterSpec:
    """Every field away from its default."""
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
        strength=-0.1,
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


@pytest.mark.parametrize("make", [full_spec, lambda: make_spec(tiny_description())])
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
        ({"layers": [4]}, "sites.block_output.layers: got 4, expected at most 3"),
        ({"rank": 33}, "sites.block_output.rank: got 33, expected at most the hidden size 32"),
        ({"name": ""}, "match pattern"),
        ({"name": "-x"}, "match pattern"),
        ({"name": "a" * 97}, "match pattern"),
        ({"name": "a\n"}, "match pattern"),
        ({"strength": float("inf")}, "finite"),
        ({"typo": 1}, "not permitted"),
    ],
)
def test_an_adapter_spec_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason.replace(".", r"\.")):
        make_spec(tiny_description(), **change)


def test_a_spec_is_frozen() -> None:
    spec = full_spec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]

"""What a request may say about its adapters, and what it is told when it is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reft_core.engine.interface import AdapterChoice, Request
from reft_core.errors import InvalidRequest, UnsupportedFeature
from reft_core.vllm.request import Wanted, from_extra_args, to_extra_args

DIGEST = "ab" * 32


def test_ours_come_back() -> None:
    choices = (AdapterChoice(DIGEST, 0.5, {"a": 2.0}), AdapterChoice("cd" * 32))
    request = Request("r", (1, 2), adapters=choices)
    found = from_extra_args(json.loads(json.dumps(to_extra_args(request))))
    assert found.adapters == (
        Wanted(digest=DIGEST, strength=0.5, subspaces={"a": 2.0}),
        Wanted(digest="cd" * 32),
    )
    assert found.prompt_len is None


def test_a_given_completion_is_no_part_of_the_prompt() -> None:
    request = Request("r", (1, 2, 3), adapters=(AdapterChoice(DIGEST),), completion=(4, 5))
    assert from_extra_args(to_extra_args(request)).prompt_len == 3


def test_the_base_model_names_nothing() -> None:
    assert to_extra_args(Request("r", (1,))) == {}
    for nothing in (None, {}, {"other": 1}):
        assert from_extra_args(nothing).adapters == ()


def test_an_interchange_is_for_the_embedded_engine() -> None:
    request = Request("r", (1,), adapters=(AdapterChoice(DIGEST, source=(1, 2)),))
    with pytest.raises(UnsupportedFeature, match="embedded engine"):
        to_extra_args(request)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (DIGEST, Wanted(digest=DIGEST)),
        ("sentiment", Wanted(name="sentiment")),
        (
            '{"adapters": [{"name": "sentiment", "strength": 2}]}',
            Wanted(name="sentiment", strength=2),
        ),
    ],
)
def test_strings_are_what_http_has(given: str, wanted: Wanted) -> None:
    assert from_extra_args({"reft": given}).adapters == (wanted,)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("no such name!", "reft"),
        (3, "reft"),
        ("{", "reft"),
        ({"adapters": [{}]}, "reft.adapters.0"),
        ({"adapters": [{"name": "a", "digest": DIGEST}]}, "reft.adapters.0"),
        ({"adapters": [{"name": "a", "strength": "much"}]}, "reft.adapters.0.strength"),
        ({"adapters": [], "more": 1}, "reft.more"),
        ({"adapters": [], "prompt_len": 0}, "reft.prompt_len"),
    ],
)
def test_errors_name_the_field(given: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        from_extra_args({"reft": given})
    assert caught.value.field == field

"""PEFT's patterns mean here what they mean there, and none can run for ever."""

from __future__ import annotations

import re

import pytest

from reft_core.convert.peft.patterns import parse_endings
from reft_core.errors import AdapterFileInvalid

PATHS = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "transformer.h.1.attn.c_attn",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "self.attn.q.proj",
        "model.layers.0.mlp.down_proj",
        "layers.0.self_attn.q_proj",
        ".q_proj",
        "x.model.layers.0.mlp.down_proj",
        r"layers\.\d+\.self_attn\.q_proj",
        r"layers\.(0|1)\..*_proj",
        "q_proj|c_attn",
        "[qk]_proj",
    ],
)
def test_an_ending_matches_what_pefts_expression_does(text: str, path: str) -> None:
    (ending,) = parse_endings([text], "rank_pattern")
    assert ending.ends(path) == bool(re.match(rf"(.*\.)?({text})$", path))


@pytest.mark.parametrize(
    "text",
    [
        "(",
        "(a+)+x",
        ".*.*.*x",
        "(a|aa)" * 40 + "x",
        r"(.*).*\1x",
        "(?:a|aa)(?:a|aa)x",
        ".*(a|b)(c|d)",
        "a|b|c|d|e|f|g|h",
        "x" * 257,
    ],
)
def test_expressions_that_may_take_long_are_refused_unread(text: str) -> None:
    with pytest.raises(AdapterFileInvalid, match=r"adapter_config\.json: rank_pattern: got '"):
        parse_endings([text], "rank_pattern")


def test_names_may_be_many_and_expressions_few() -> None:
    assert len(parse_endings([f"layers.{i}.q_proj" for i in range(1000)], "rank_pattern")) == 1000
    expressions = [rf"layers\.{i}\.q_proj" for i in range(17)]
    assert len(parse_endings(expressions[:16], "rank_pattern")) == 16
    with pytest.raises(AdapterFileInvalid, match="at most 16 patterns that are no names"):
        parse_endings(expressions, "rank_pattern")

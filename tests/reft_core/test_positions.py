"""The position rule: its grammar, its arithmetic and their conventions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_core.errors import InvalidRequest
from reft_core.positions import MAX_RULE_POSITIONS, PositionRule

UNTIED = {"tied": False}
HALF = {"cap": "half"}
BEFORE_LAST = {"anchor": "before_last"}


@pytest.mark.parametrize(
    ("text", "conventions", "prompt_len", "units"),
    [
        # Two sides, tied: one unit.
        ("f2+l2", {}, 10, [(0, 1, 8, 9)]),
        ("f1+l4", {}, 10, [(0, 6, 7, 8, 9)]),
        ("f2+l2", {}, 4, [(0, 1, 2, 3)]),
        # Two sides, untied: two units, also when N and M differ.
        ("f2+l2", UNTIED, 10, [(0, 1), (8, 9)]),
        ("f1+l4", UNTIED, 10, [(0,), (6, 7, 8, 9)]),
        ("f4+l1", UNTIED, 10, [(0, 1, 2, 3), (9,)]),
        # Too short a prompt: each of two sides takes at most half, rounded down.
        ("f7+l7", {}, 5, [(0, 1, 3, 4)]),
        ("f7+l7", {}, 4, [(0, 1, 2, 3)]),
        ("f7+l7", {}, 2, [(0, 1)]),
        ("f7+l7", {}, 1, [()]),
        ("f7+l7", UNTIED, 5, [(0, 1), (3, 4)]),
        ("f7+l7", UNTIED, 1, [(), ()]),
        ("f1+l4", UNTIED, 6, [(0,), (3, 4, 5)]),
        ("f1+l4", UNTIED, 5, [(0,), (3, 4)]),
        ("f4+l1", UNTIED, 3, [(0,), (2,)]),
        ("f7+l7", HALF, 5, [(0, 1, 3, 4)]),
        # One side may take the whole prompt, unless the cap is pyreft's.
        ("f3", {}, 10, [(0, 1, 2)]),
        ("l3", {}, 10, [(7, 8, 9)]),
        ("l3", {}, 2, [(0, 1)]),
        ("f3", {}, 2, [(0, 1)]),
        ("l1", {}, 1, [(0,)]),
        ("f1", {}, 1, [(0,)]),
        ("l3", UNTIED, 10, [(7, 8, 9)]),
        ("f3", UNTIED, 10, [(0, 1, 2)]),
        ("f3", HALF, 5, [(0, 1)]),
        ("l3", HALF, 5, [(3, 4)]),
        ("l3", HALF, 2, [(1,)]),
        ("l1", HALF, 1, [()]),
        ("f1", HALF, 1, [()]),
        # Anchored before the last token: as if the prompt were one token shorter.
        ("l1", BEFORE_LAST, 5, [(3,)]),
        ("l1", BEFORE_LAST, 2, [(0,)]),
        ("l1", BEFORE_LAST, 1, [()]),
        ("f2+l2", BEFORE_LAST, 10, [(0, 1, 7, 8)]),
        ("f2+l2", BEFORE_LAST, 4, [(0, 2)]),
        ("f2+l2", BEFORE_LAST | UNTIED, 1, [(), ()]),
        ("l3", BEFORE_LAST | HALF, 6, [(3, 4)]),
        ("prompt", BEFORE_LAST, 4, [(0, 1, 2)]),
        ("-1", BEFORE_LAST, 5, [(3,)]),
        # Every token.
        ("prompt", {}, 4, [(0, 1, 2, 3)]),
        ("prompt", {}, 1, [(0,)]),
        ("prompt", UNTIED, 2, [(0, 1)]),
        # Explicit positions; those that the prompt does not have are left out.
        ("3,0,-1", {}, 6, [(0, 3, 5)]),
        ("3,0,-1", {}, 3, [(0, 2)]),
        ("0,-1", {}, 1, [(0,)]),
        ("-3", {}, 3, [(0,)]),
        ("-3", {}, 2, [()]),
        ("9", {}, 9, [()]),
        ("9", {}, 10, [(9,)]),
        ("0,1", UNTIED, 2, [(0, 1)]),
        # Nothing to edit in nothing.
        ("l1", {}, 0, [()]),
        ("f1+l1", UNTIED, 0, [(), ()]),
    ],
)
def test_resolve(
    text: str, conventions: dict[str, Any], prompt_len: int, units: list[tuple[int, ...]]
) -> None:
    rule = PositionRule.parse(text, **conventions)
    assert rule.resolve(prompt_len) == tuple(units)
    assert rule.num_units == len(units)
    assert rule.first_edited(prompt_len) == min((*sum(units, ()), prompt_len))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("f4096", PositionRule(first=MAX_RULE_POSITIONS)),
        ("f1+l4096", PositionRule(first=1, last=MAX_RULE_POSITIONS)),
        (" f1 + l2 ", PositionRule(first=1, last=2)),
        ("3, 0,\t-1", PositionRule(explicit=(3, 0, -1))),
        ("f007", PositionRule(first=7)),
        ("prompt", PositionRule(every=True)),
        (
            ",".join(map(str, range(MAX_RULE_POSITIONS))),
            PositionRule(explicit=tuple(range(MAX_RULE_POSITIONS))),
        ),
    ],
)
def test_parse_accepts(text: str, rule: PositionRule) -> None:
    assert PositionRule.parse(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "f", "l", "+", "f+l", "f1+", "+l1", "f1l1", "l1+f1", "f1+f1", "f1+l1+l1"),
        *("f0", "l0", "f1+l0", "f0+l1", "f4097", "l99999", "f123456", "f-1", "f1.5", "f1+l+1"),
        *("F1", "first1", "all", "Prompt", "prompt+l1", "prompts", "f1,0", "0+l1"),
        *("1,,2", ",1", "1,", "1;2", "1.5", "--1", "+1", "0x1", "12345678", "None"),
        *("0,0", "1,2,1", "0,-0"),
        ",".join(map(str, range(MAX_RULE_POSITIONS + 1))),
        "1," * 100_000 + "1",
        # Taking the space out would turn two positions into another one.
        *("1 2", "1 2,3", "f1 2", "pro mpt", "- 1"),
        # One spelling a digit: what a person reads is what is parsed.
        *("f\u0663", "\u0661,\u0662"),
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PositionRule.parse(text)
    message = str(caught.value)
    assert caught.value.field == "positions"
    assert message.startswith(f"positions: got {repr(text)[:110]}")
    assert "expected 'fN', 'lN', 'fN+lM' (N, M from 1 to 4096), 'prompt'" in message
    assert len(message) < 400


counts = st.integers(1, 20) | st.integers(1, MAX_RULE_POSITIONS)
shapes = st.one_of(
    st.builds(dict, first=counts),
    st.builds(dict, last=counts),
    st.builds(dict, first=counts, last=counts),
    st.just({"every": True}),
    st.builds(
        dict,
        explicit=st.lists(st.integers(-30, 30), min_size=1, max_size=12, unique=True).map(tuple),
    ),
)
conventions = st.fixed_dictionaries(
    {
        "tied": st.booleans(),
        "anchor": st.sampled_from(["prompt_end", "before_last"]),
        "cap": st.sampled_from(["shared", "half"]),
    }
)


@given(shapes, conventions)
def test_a_rule_reads_back_from_its_text(shape: dict[str, Any], how: dict[str, Any]) -> None:
    rule = PositionRule(**shape, **how)
    assert PositionRule.parse(str(rule), **how) == rule


@given(shapes, conventions, st.integers(0, 60))
def test_positions_are_ascending_disjoint_and_in_range(
    shape: dict[str, Any], how: dict[str, Any], prompt_len: int
) -> None:
    rule = PositionRule(**shape, **how)
    units = rule.resolve(prompt_len)
    assert len(units) == rule.num_units
    for unit in units:
        assert list(unit) == sorted(unit)
    edited = [position for unit in units for position in unit]
    assert len(set(edited)) == len(edited)
    end = prompt_len - (rule.anchor == "before_last")
    assert all(0 <= position < end for position in edited)
    assert rule.first_edited(prompt_len) == min(edited, default=prompt_len)


@given(shapes, conventions, st.integers(0, 60))
def test_tying_changes_the_units_and_not_the_positions(
    shape: dict[str, Any], how: dict[str, Any], prompt_len: int
) -> None:
    tied = PositionRule(**shape, **(how | {"tied": True})).resolve(prompt_len)
    untied = PositionRule(**shape, **(how | {"tied": False})).resolve(prompt_len)
    assert tied == (sum(untied, ()),)


@given(shapes, st.booleans(), st.integers(1, 60))
def test_before_last_is_a_prompt_one_token_shorter(
    shape: dict[str, Any], tied: bool, prompt_len: int
) -> None:
    before_last = PositionRule(**shape, tied=tied, anchor="before_last")
    assert before_last.resolve(prompt_len) == PositionRule(**shape, tied=tied).resolve(
        prompt_len - 1
    )

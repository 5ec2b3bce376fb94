"""Blocks have one name in vLLM exactly where our own engine gives them one name."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse, PromptEdits
from reft_core.engine.provenance import BLOCK_TOKENS, Provenance
from reft_core.vllm.admitted import runs_of
from reft_core.vllm.keys import block_keys
from tests.factories import random_adapter, tiny_description

Stack = tuple[tuple[int, float], ...]
STACKS: list[Stack] = [(), ((0, 1.0),), ((0, 0.5),), ((1, 1.0),), ((2, 1.0),), ((0, 1.0), (2, 1.0))]
LENGTHS = (15, 40, 64, 65, 100)


@cache
def adapters() -> tuple[Adapter, ...]:
    model = tiny_description()
    return (
        random_adapter(model, seed=1, positions="l20"),
        random_adapter(model, seed=2, positions="f2+l3", tied=False),
        random_adapter(model, seed=3, positions="prompt"),
    )


def provenance(stack: Stack, length: int) -> Provenance:
    uses = tuple(AdapterUse(adapters()[i], strength) for i, strength in stack)
    return Provenance.of(PromptEdits(uses, length) if uses else None, length)


def keys(stack: Stack, length: int, num_blocks: int) -> list[list[tuple[str, str]]]:
    """What vLLM's hash takes in, block by block."""
    runs = runs_of(provenance(stack, length).marks)
    starts = range(0, num_blocks * BLOCK_TOKENS, BLOCK_TOKENS)
    return [block_keys(runs, start, start + BLOCK_TOKENS) for start in starts]


def test_names_meet_exactly_where_our_engines_meet() -> None:
    tokens = list(range(112))  # one conversation: every shorter prompt is the beginning of it
    num_blocks = len(tokens) // BLOCK_TOKENS
    cases = list(product(STACKS, LENGTHS))
    for left, right in product(cases, cases):
        ours = [provenance(*case).block_names(tokens, num_blocks) for case in (left, right)]
        theirs = [keys(*case, num_blocks) for case in (left, right)]
        for count in range(1, num_blocks + 1):
            meet = ours[0][count - 1] == ours[1][count - 1]
            assert meet == (theirs[0][:count] == theirs[1][:count]), (left, right, count)


def test_unedited_blocks_have_no_key() -> None:
    assert keys(((0, 1.0),), 100, 6)[:5] == [[]] * 5
    assert keys(((0, 1.0),), 100, 6)[5]
    assert keys(((0, 0.0),), 100, 6) == [[]] * 6


@pytest.mark.parametrize("length", LENGTHS)
def test_runs_say_what_marks_say(length: int) -> None:
    marks = provenance(((1, 1.0), (2, 1.0)), length).marks
    told = {p: bytes.fromhex(mark) for a, b, mark in runs_of(marks) for p in range(a, b)}
    assert told == marks

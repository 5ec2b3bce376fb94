"""The plan of a packed forward equals a brute-force table of rows and their edits."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_core.adapter import Adapter, EditKey
from reft_core.batch import EditPlan, PackedChunk, PromptEdits, build_plan
from tests.factories import NUM_LAYERS, random_adapter, tiny_description

LAST_LAYER = NUM_LAYERS - 1


@cache
def adapters() -> tuple[Adapter, ...]:
    """Every kind of rule, tied and not, in some layers and in all."""
    model = tiny_description()
    return (
        random_adapter(model, seed=1, rank=1, positions="l1"),
        random_adapter(model, seed=2, rank=1, positions="f2+l3", layers=[0, LAST_LAYER]),
        random_adapter(model, seed=3, rank=1, positions="f1+l2", tied=False, layers=[1, 3]),
        random_adapter(model, seed=4, rank=1, positions="prompt", layers=[LAST_LAYER]),
        random_adapter(model, seed=5, rank=1, positions="0,4,-2"),
    )


@dataclass(frozen=True)
class Part:
    """Some tokens of one prompt, as hypothesis draws them."""

    adapter: int | None
    strength: float
    prompt_len: int
    first_position: int
    length: int


@st.composite
def parts(draw: st.DrawFn) -> Part:
    prompt_len = draw(st.integers(1, 14))
    first = draw(st.integers(0, prompt_len - 1))
    return Part(
        draw(st.none() | st.integers(0, len(adapters()) - 1)),
        draw(st.sampled_from([1.0, 1.0, 0.5, -2.0, 0.0])),
        prompt_len,
        first,
        draw(st.integers(1, prompt_len - first)),
    )


def pack(drawn: list[Part]) -> list[PackedChunk]:
    chunks, row = [], 0
    for part in drawn:
        edits = None
        if part.adapter is not None:
            edits = PromptEdits(adapters()[part.adapter], part.prompt_len, part.strength)
        chunks.append(PackedChunk(row, part.first_position, part.length, edits))
        row += part.length
    return chunks


Where = tuple[int, int]
What = tuple[str, float, EditKey]


def brute_force(drawn: list[Part]) -> dict[Where, What]:
    """(layer, row) → the edit there, one token and one layer after the other."""
    table: dict[Where, What] = {}
    row = 0
    for part in drawn:
        for position in range(part.first_position, part.first_position + part.length):
            if part.adapter is not None and part.strength != 0:
                adapter = adapters()[part.adapter]
                units = adapter.rule.resolve(part.prompt_len)
                for key in adapter.edits:
                    read_by_nobody = key.layer == LAST_LAYER and position != part.prompt_len - 1
                    if position in units[key.unit] and not read_by_nobody:
                        assert (key.layer, row) not in table
                        table[key.layer, row] = (adapter.digest, part.strength, key)
            row += 1
    return table


def as_table(plan: EditPlan) -> dict[Where, What]:
    """The plan in the same form; no row may come twice in a layer."""
    names = {
        id(edit): (adapter.digest, key)
        for adapter in adapters()
        for key, edit in adapter.edits.items()
    }
    table: dict[Where, What] = {}
    for layer, edits in plan.layers.items():
        for row_edit in edits:
            digest, key = names[id(row_edit.edit)]
            assert key.layer == layer
            for row in row_edit.rows.tolist():
                assert (layer, row) not in table
                table[layer, row] = (digest, row_edit.strength, key)
    return table


@given(st.lists(parts(), max_size=6))
def test_the_plan_is_the_brute_force_table(drawn: list[Part]) -> None:
    plan = build_plan(pack(drawn))
    expected = brute_force(drawn)
    assert as_table(plan) == expected
    assert plan.num_edits == len(expected)
    for edits in plan.layers.values():
        assert edits, "a layer without edits gets no hook"
        assert all(len(row_edit.rows) for row_edit in edits)
        assert all(row_edit.rows.dtype == torch.int64 for row_edit in edits)


@given(st.lists(parts(), max_size=6))
def test_an_adapters_weights_are_read_once_a_layer(drawn: list[Part]) -> None:
    """Requests with one adapter and strength share a RowEdit, however many they are."""
    plan = build_plan(pack(drawn))
    for edits in plan.layers.values():
        readers = Counter((id(row_edit.edit), row_edit.strength) for row_edit in edits)
        assert set(readers.values()) == {1}


def test_layers_that_change_the_same_rows_share_the_index() -> None:
    drawn = [Part(0, 1.0, 5, 0, 5), Part(0, 1.0, 3, 0, 3)]
    plan = build_plan(pack(drawn))
    assert [edit.rows.tolist() for edits in plan.layers.values() for edit in edits] == [
        [4, 7]
    ] * NUM_LAYERS
    assert len({id(edit.rows) for edits in plan.layers.values() for edit in edits}) == 1


@given(parts(), st.lists(st.integers(1, 13), max_size=4))
def test_chunking_moves_no_edit(part: Part, cuts: list[int]) -> None:
    """The chunks of a prompt together edit what the whole prompt would."""
    whole = Part(part.adapter, part.strength, part.prompt_len, 0, part.prompt_len)
    bounds = sorted({0, part.prompt_len, *(cut for cut in cuts if cut < part.prompt_len)})
    chunks = [
        Part(part.adapter, part.strength, part.prompt_len, start, end - start)
        for start, end in itertools.pairwise(bounds)
    ]
    packed = as_table(build_plan(pack(chunks)))
    assert packed == as_table(build_plan(pack([whole])))
    alone = sum(build_plan(pack([chunk])).num_edits for chunk in chunks)
    assert alone == len(packed)


@given(parts())
def test_num_edits_is_what_the_plans_will_apply(part: Part) -> None:
    """Also with strength 0, which applies none."""
    whole = Part(part.adapter, part.strength, part.prompt_len, 0, part.prompt_len)
    (chunk,) = pack([whole])
    promised = chunk.edits.num_edits if chunk.edits else 0
    assert promised == build_plan([chunk]).num_edits


@pytest.mark.parametrize(
    ("adapter", "prompt_len", "layer", "live"),
    [
        (3, 5, LAST_LAYER, (4,)),
        (1, 6, 0, (0, 1, 3, 4, 5)),
        (1, 6, LAST_LAYER, (5,)),
        (4, 6, 0, (0, 4)),
        (4, 6, LAST_LAYER, ()),  # positions 0 and 4: nothing reads the last layer there
    ],
)
def test_last_layer_edits_live_at_the_last_token_alone(
    adapter: int, prompt_len: int, layer: int, live: tuple[int, ...]
) -> None:
    edits = PromptEdits(adapters()[adapter], prompt_len, 1.0)
    assert edits.live_positions(EditKey(layer, "block_output", 0)) == live


def test_prefix_unit_of_the_last_layer_is_dead_and_its_suffix_unit_lives() -> None:
    edits = PromptEdits(adapters()[2], 6, 1.0)
    assert edits.positions == ((0,), (4, 5))
    assert edits.live_positions(EditKey(3, "block_output", 0)) == ()
    assert edits.live_positions(EditKey(3, "block_output", 1)) == (5,)
    assert edits.num_edits == 3 + 1


@pytest.mark.parametrize(
    ("positions", "rows"), [((), []), ((0, 2), []), ((3, 5, 7, 8), [10, 12, 14]), ((8, 99), [])]
)
def test_rows_of_a_chunk(positions: tuple[int, ...], rows: list[int]) -> None:
    assert PackedChunk(row=10, first_position=3, length=5, edits=None).rows_of(positions) == rows


def test_no_adapters_no_plan() -> None:
    assert build_plan([]).layers == {}
    assert build_plan(pack([Part(None, 1.0, 5, 0, 5), Part(0, 0.0, 5, 0, 5)])).layers == {}

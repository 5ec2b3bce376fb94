"""What sequences have in common, and which rows a forward over their chunks has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse, PromptEdits, stage_of
from reft_core.engine.interface import Request
from reft_core.engine.packing import LEAST_PACE, MOST_BEYOND, Packing
from reft_core.engine.provenance import Provenance, num_common
from reft_core.engine.sequence import Sequence
from reft_core.engine.sharing import Chunk, Common, Lead, common, find_lead, lay_out
from tests.factories import random_adapter, random_prefix_adapter, random_prompt, tiny_description

PROMPT = random_prompt(40, seed=1)
NUM_LAYERS = 4


def adapter(positions: str, **options: Any) -> Adapter:
    return random_adapter(tiny_description(), positions=positions, **options)


def sequence(
    *uses: Adapter | AdapterUse, prompt: tuple[int, ...] = PROMPT, tenant: str = ""
) -> Sequence:
    """One as the engine makes it."""
    edits = None
    if uses:
        made = tuple(use if isinstance(use, AdapterUse) else AdapterUse(use) for use in uses)
        edits = PromptEdits(made, len(prompt))
    provenance = Provenance.of(edits, len(prompt), tenant)
    return Sequence(Request("r", prompt), print, edits, frozenset(), provenance)


@given(
    st.lists(st.integers(0, 2), max_size=90),
    st.lists(st.integers(0, 2), max_size=9),
    st.lists(st.integers(0, 2), max_size=90),
)
def test_the_common_beginning(head: list[int], left: list[int], right: list[int]) -> None:
    one, other = head + left, head + right
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert num_common(one, other) == next(differs, min(len(one), len(other)))


@pytest.mark.parametrize(
    ("layer", "site", "stage"),
    [
        (0, "block_output", 1),
        (3, "block_output", 4),
        (2, "attn_output", 2),
        (2, "mlp_output", 2),
        (1, "heads", 1),
        (0, "linear:self_attn.k_proj", 0),
    ],
)
def test_an_edit_leaves_the_layers_below_it_as_they_are(layer: int, site: str, stage: int) -> None:
    assert stage_of(layer, site) == stage


SUFFIX = adapter("l3", seed=1)
BOTH_ENDS = adapter("f2+l3", seed=2, layers=[2, 3])
INSIDE = adapter("f2+l3", seed=3, layers=[2, 3], sites=("mlp_output",))
KEYS = adapter("l4", seed=4, method="lora", sites=("linear:self_attn.k_proj",), layers=[1])
TOP = adapter("l1", seed=5, layers=[3])
KV_PREFIX = random_prefix_adapter(tiny_description(), "kv", length=3)
EMBEDDED = random_prefix_adapter(tiny_description(), "embedding", length=3)
OTHER_END = (*PROMPT[:30], *random_prompt(10, seed=9))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (sequence(), sequence(), Common(40, 40, 0, True)),
        (sequence(), sequence(SUFFIX), Common(37, 40, 1)),
        (sequence(BOTH_ENDS), sequence(SUFFIX), Common(0, 40, 1)),
        (sequence(BOTH_ENDS), sequence(), Common(0, 40, 3)),
        (sequence(BOTH_ENDS), sequence(INSIDE), Common(0, 40, 2)),
        (sequence(BOTH_ENDS), sequence(BOTH_ENDS), Common(40, 40, 3, True)),
        (sequence(BOTH_ENDS), sequence(AdapterUse(BOTH_ENDS, 0.5)), Common(0, 40, 3)),
        (sequence(), sequence(AdapterUse(BOTH_ENDS, 0.0)), Common(40, 40, 0, True)),
        (sequence(KEYS), sequence(TOP), Common(36, 40, 1)),
        # What only the logits read is in no key, but it is in the logits.
        (sequence(), sequence(TOP), Common(40, 40, 4)),
        (sequence(BOTH_ENDS), sequence(BOTH_ENDS, SUFFIX), Common(37, 40, 1)),
        (sequence(SUFFIX), sequence(SUFFIX, prompt=OTHER_END), Common(30, 30, 1, True)),
        (sequence(SUFFIX), sequence(SUFFIX, prompt=PROMPT[:39]), Common(36, 39, 1)),
        (sequence(), sequence(prompt=PROMPT[:20]), Common(20, 20, 0, True)),
        (sequence(), sequence(prompt=random_prompt(9)), Common()),
        (sequence(tenant="a"), sequence(tenant="b"), Common()),
        (sequence(), sequence(KV_PREFIX), Common()),
        (sequence(EMBEDDED), sequence(KV_PREFIX), Common()),
        (sequence(EMBEDDED), sequence(EMBEDDED, SUFFIX), Common(40, 43, 1)),
    ],
)
def test_what_two_sequences_have_in_common(
    one: Sequence, other: Sequence, expected: Common
) -> None:
    assert common(one, other) == expected
    assert common(other, one) == expected


def test_one_that_reads_a_source_prompt_has_nothing_in_common() -> None:
    """The engine gives it no provenance."""
    alone = sequence()
    alone.provenance = None
    assert common(alone, sequence()) == Common()


def test_generated_tokens_are_not_those_of_a_prompt() -> None:
    """After a preemption it begins with a prompt's edits and goes on with generated tokens'."""
    everywhere = adapter(
        "prompt", seed=6, phase="all", method="lora", sites=("linear:mlp.up_proj",)
    )
    prompt_only = adapter("prompt", seed=7)
    for used, same in ((everywhere, 39), (prompt_only, 30)):
        preempted = sequence(used, prompt=PROMPT[:30])
        preempted.token_ids += PROMPT[30:39]
        assert common(preempted, sequence(used)).same == same
    base = sequence(prompt=PROMPT[:30])
    base.token_ids += PROMPT[30:39]
    assert common(base, sequence()).same == 39


def lead_of(one: Sequence, chunks: list[Chunk], *, branching: bool) -> Lead | None:
    found = [(chunk, common(one, chunk.sequence)) for chunk in chunks]
    return find_lead(one, found, NUM_LAYERS, branching)


def test_the_lead_is_who_saves_most() -> None:
    shallow, base = sequence(adapter("f1", seed=8)), sequence()
    chunks = [Chunk(shallow, 0, 20), Chunk(base, 0, 20)]
    lead = lead_of(sequence(BOTH_ENDS), chunks, branching=True)
    assert lead is not None
    assert (lead.chunk, lead.same, lead.alike, lead.depth) == (chunks[1], 0, 20, 3)
    assert lead_of(sequence(BOTH_ENDS), chunks, branching=False) is None
    suffix = lead_of(sequence(SUFFIX), chunks, branching=False)
    assert suffix is not None
    assert (suffix.same, suffix.alike) == (20, 20)
    assert lead_of(sequence(prompt=random_prompt(9)), chunks, branching=True) is None


@pytest.mark.parametrize(
    ("start", "follows"), [(0, None), (7, None), (8, 12), (11, 12), (12, None), (20, None)]
)
def test_only_what_is_computed_now_can_be_followed(start: int, follows: int | None) -> None:
    late = sequence()
    late.num_computed = start
    lead = lead_of(late, [Chunk(sequence(), 8, 12)], branching=True)
    assert (lead and lead.same) == follows


@pytest.mark.parametrize(("other", "same"), [(sequence(), 40), (sequence(TOP), 39)])
def test_the_last_row_is_shared_only_if_its_logits_are(other: Sequence, same: int) -> None:
    lead = lead_of(other, [Chunk(sequence(), 0, 40)], branching=False)
    assert lead is not None
    assert lead.same == same


def packed(*sequences: Sequence, budget: int = 1000) -> list[Chunk]:
    packing = Packing(NUM_LAYERS, budget * NUM_LAYERS, branching=True)
    for one in sequences:
        packing.put(one)
    return packing.chunks


def rows_by_layer(chunks: list[Chunk]) -> list[int]:
    """Rows that each layer computes."""
    levels = lay_out(chunks).levels
    return [
        next(level.num_rows for level in reversed(levels) if level.stage <= layer)
        for layer in range(NUM_LAYERS)
    ]


@pytest.mark.parametrize(
    ("sequences", "rows"),
    [
        ([sequence()], [40, 40, 40, 40]),
        ([sequence(), sequence(), sequence()], [40, 40, 40, 40]),
        ([sequence(SUFFIX), sequence(), sequence(SUFFIX)], [40, 43, 43, 43]),
        ([sequence(BOTH_ENDS), sequence(), sequence(BOTH_ENDS)], [40, 40, 40, 80]),
        ([sequence(BOTH_ENDS), sequence(INSIDE), sequence()], [40, 40, 80, 120]),
        ([sequence(), sequence(TOP)], [40, 40, 40, 40]),
        ([sequence(SUFFIX), sequence(SUFFIX, prompt=OTHER_END)], [50, 50, 50, 50]),
        ([sequence(BOTH_ENDS), sequence(SUFFIX, prompt=OTHER_END)], [50, 80, 80, 80]),
        ([sequence(), sequence(KV_PREFIX), sequence(KV_PREFIX)], [80, 80, 80, 80]),
        ([sequence(), sequence(tenant="other")], [80, 80, 80, 80]),
        ([sequence(), sequence(prompt=random_prompt(9))], [49, 49, 49, 49]),
    ],
)
def test_how_many_rows_each_layer_computes(sequences: list[Sequence], rows: list[int]) -> None:
    assert rows_by_layer(packed(*sequences)) == rows


def test_an_edit_of_the_last_output_has_rows_of_its_own_after_the_last_layer() -> None:
    first, last = lay_out(packed(sequence(), sequence(TOP), sequence(TOP))).levels
    assert (first.stage, first.num_rows) == (0, 40)
    assert (last.stage, last.num_rows) == (4, 41)
    assert last.taken == (*range(40), 39)


@given(st.data())
def test_rows_hold_what_they_are_said_to(data: st.DataObject) -> None:
    """A forward over strings: a row is its token, its layers and the edits that reached it.

    Computed with any sharing or none, each chunk's last level must hold the same.
    """
    kinds = [(), (SUFFIX,), (BOTH_ENDS,), (INSIDE,), (TOP,), (BOTH_ENDS, SUFFIX)]
    prompts = [PROMPT, OTHER_END, PROMPT[:35]]
    drawn = data.draw(
        st.lists(
            st.tuples(st.sampled_from(kinds), st.sampled_from(prompts)), min_size=1, max_size=6
        )
    )
    budget = data.draw(st.integers(1, 100))
    chunks = packed(*(sequence(*used, prompt=prompt) for used, prompt in drawn), budget=budget)
    layout = lay_out(chunks)
    for level in layout.levels:
        for chunk, own in zip(chunks, level.own, strict=True):
            assert chunk.start <= own.first <= own.end == chunk.end
    # What each row has read so far: its position, and at each layer the edits at or below it.
    states = [
        (chunk.sequence.token_ids[p], p)
        for chunk, own in zip(chunks, layout.first.own, strict=True)
        for p in range(own.first, own.end)
    ]
    for level in layout.levels[1:]:
        states = [states[row] for row in level.taken]
        assert len(states) == level.num_rows
    for chunk in chunks:
        for p in range(chunk.start, chunk.end):
            row = layout.row_of(layout.last, chunk, p)
            assert states[row] == (chunk.sequence.token_ids[p], p)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 3))
def test_the_budget_counts_what_is_computed(budget: int, count: int, seed: int) -> None:
    kinds = [(), (SUFFIX,), (BOTH_ENDS,), (INSIDE,), (TOP,)]
    sequences = [sequence(*kinds[(i + seed) % 5]) for i in range(count)]
    chunks = packed(*sequences, budget=budget)
    followers = [chunk for chunk in chunks if chunk.lead is not None and chunk.completes_prompt]
    beyond = MOST_BEYOND if followers else 0
    assert sum(rows_by_layer(chunks)) <= budget * NUM_LAYERS * (1 + beyond)


def test_companions_advance_at_one_pace() -> None:
    """Three adapters above layer 2 on one prompt: 3 layers once, and one for each."""
    packing = Packing(NUM_LAYERS, 24 * NUM_LAYERS, branching=True)
    first, *others = (sequence(adapter("f2", seed=seed, layers=[2, 3])) for seed in range(20, 24))
    assert all(packing.may_share_trunk(first, other) for other in others)
    pace, together = packing.pace_of(first, others)
    assert (pace, together) == (24 * 4 // (4 + 3), others)
    for one in (first, *together):
        chunk = packing.put(one, pace)
        assert chunk is not None
        assert (chunk.start, chunk.end) == (0, pace)
    assert rows_by_layer(packing.chunks) == [13, 13, 13, 52]


def test_too_many_companions_do_not_crawl() -> None:
    packing = Packing(NUM_LAYERS, 24 * NUM_LAYERS, branching=True)
    first, *others = (sequence(adapter("f2", seed=seed, layers=[2, 3])) for seed in range(20, 40))
    pace, together = packing.pace_of(first, others)
    assert pace >= LEAST_PACE
    assert 0 < len(together) < len(others)


def test_who_is_no_companion() -> None:
    packing = Packing(NUM_LAYERS, 24 * NUM_LAYERS, branching=True)
    first = sequence(BOTH_ENDS)
    assert packing.may_share_trunk(first, sequence(INSIDE))
    assert not packing.may_share_trunk(first, sequence(BOTH_ENDS)), "it follows for nothing"
    assert not packing.may_share_trunk(first, sequence(prompt=random_prompt(9)))
    urgent = sequence(INSIDE)
    urgent.request = Request("r", PROMPT, priority=-1)
    assert not packing.may_share_trunk(first, urgent)
    packing.branching = False
    assert not packing.may_share_trunk(first, sequence(INSIDE))


def test_a_chunk_alone_follows_nobody() -> None:
    lead = Lead(Chunk(sequence(), 0, 40), 37, 40, 1)
    chunk = Chunk(sequence(SUFFIX), 0, 40, lead)
    assert chunk.num_shared == 37
    assert chunk.alone().num_shared == 0
    assert lay_out([chunk.alone()]).first.num_rows == 40

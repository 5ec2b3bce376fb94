"""The plan of a packed forward equals a brute-force table of rows and their edits."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_core.adapter import Adapter, EditKey
from reft_core.batch import (
    AdapterUse,
    EditPlan,
    Narrowing,
    PackedChunk,
    PromptEdits,
    build_decode_plan,
    build_plan,
)
from tests.factories import (
    NUM_LAYERS,
    assert_close,
    random_adapter,
    random_prefix_adapter,
    tiny_description,
)

LAST_LAYER = NUM_LAYERS - 1
KEYS, VALUES = "linear:self_attn.k_proj", "linear:self_attn.v_proj"
RESIDUAL = ("block_output", "attn_output", "mlp_output", "heads")


@cache
def adapters() -> tuple[Adapter, ...]:
    """Every kind of rule, tied and not, in some layers and in all, at several sites."""
    model = tiny_description()
    return (
        random_adapter(model, seed=1, rank=1, positions="l1"),
        random_adapter(model, seed=2, rank=1, positions="f2+l3", layers=[0, LAST_LAYER]),
        random_adapter(model, seed=3, rank=1, positions="f1+l2", tied=False, layers=[1, 3]),
        random_adapter(model, seed=4, rank=1, positions="prompt", layers=[LAST_LAYER]),
        random_adapter(model, seed=5, rank=1, positions="0,4,-2"),
        random_adapter(model, seed=6, rank=1, method="lora", sites=(KEYS, VALUES), positions="f3"),
        random_adapter(
            model, seed=7, rank=1, method="series_adapter", sites=RESIDUAL[:3], positions="prompt"
        ),
        random_adapter(
            model,
            seed=8,
            rank=1,
            method="multi_head_parallel_adapter",
            positions="f1+l1",
            tied=False,
            layers=[2, LAST_LAYER],
        ),
    )


PROMPT_ONLY = [0, 1, 2, 3, 4]
"""Adapters that leave generated tokens alone; the others are of phase all."""


@cache
def prefixes() -> tuple[Adapter, ...]:
    model = tiny_description()
    return (
        random_prefix_adapter(model, "kv", length=3),
        random_prefix_adapter(model, "embedding", length=2),
    )


@dataclass(frozen=True)
class Part:
    """Some tokens of one prompt, as hypothesis draws them."""

    stack: tuple[tuple[int, float], ...]
    """Adapters and their strengths."""
    prompt_len: int
    first_position: int
    length: int
    prefix: int | None = None

    @property
    def edits(self) -> PromptEdits | None:
        uses = [AdapterUse(adapters()[index], strength) for index, strength in self.stack]
        if self.prefix is not None:
            uses.append(AdapterUse(prefixes()[self.prefix]))
        return PromptEdits(tuple(uses), self.prompt_len) if uses else None

    @property
    def num_virtual(self) -> int:
        return 0 if self.prefix is None else prefixes()[self.prefix].num_virtual_tokens

    @property
    def whole(self) -> Part:
        """All tokens of the same prompt."""
        return Part(self.stack, self.prompt_len, 0, self.num_virtual + self.prompt_len, self.prefix)


strengths = st.sampled_from([1.0, 1.0, 0.5, -2.0, 0.0])
uses = st.tuples(st.integers(0, len(adapters()) - 1), strengths)


@st.composite
def parts(draw: st.DrawFn, max_stack: int = 3) -> Part:
    stack = tuple(draw(st.lists(uses, max_size=max_stack)))
    prefix = draw(st.none() | st.none() | st.integers(0, 1))
    prompt_len = draw(st.integers(1, 14))
    whole = Part(stack, prompt_len, 0, prompt_len, prefix).whole
    first = draw(st.integers(0, whole.length - 1))
    return Part(stack, prompt_len, first, draw(st.integers(1, whole.length - first)), prefix)


def pack(drawn: list[Part]) -> list[PackedChunk]:
    chunks, row = [], 0
    for part in drawn:
        chunks.append(PackedChunk(row, part.first_position, part.length, part.edits))
        row += part.length
    return chunks


Where = tuple[int, str, int]
What = tuple[str, float, EditKey]
Table = dict[Where, list[What]]


def brute_force(drawn: list[Part]) -> Table:
    """(layer, site, row) → the edits there in order, one token and layer after the other."""
    table: Table = defaultdict(list)
    row = 0
    for part in drawn:
        for place in range(part.first_position, part.first_position + part.length):
            position = place - part.num_virtual  # in the prompt itself; virtual tokens below 0
            for index, strength in part.stack:
                adapter = adapters()[index]
                units = adapter.rule.resolve(part.prompt_len)
                for key in adapter.edits:
                    read_by_nobody = (
                        key.layer == LAST_LAYER
                        and key.site in RESIDUAL
                        and position != part.prompt_len - 1
                    )
                    if strength and position in units[key.unit] and not read_by_nobody:
                        table[key.layer, key.site, row].append((adapter.digest, strength, key))
            row += 1
    return dict(table)


def as_table(plan: EditPlan) -> Table:
    """The plan in the same form; no row may come twice in one edit."""
    names = {
        id(edit): (adapter.digest, key)
        for adapter in adapters()
        for key, edit in adapter.edits.items()
    }
    table: Table = defaultdict(list)
    for (layer, site), edits in plan.places.items():
        for row_edit in edits:
            digest, key = names[id(row_edit.edit)]
            assert (key.layer, key.site) == (layer, site)
            assert len(set(row_edit.rows.tolist())) == len(row_edit.rows)
            for row in row_edit.rows.tolist():
                table[layer, site, row].append((digest, row_edit.strength, key))
    return dict(table)


def num_triples(table: Table) -> int:
    return sum(len(edits) for edits in table.values())


@given(st.lists(parts(), max_size=6))
def test_the_plan_is_the_brute_force_table(drawn: list[Part]) -> None:
    plan = build_plan(pack(drawn))
    expected = brute_force(drawn)
    assert as_table(plan) == expected
    assert plan.num_edits == num_triples(expected)
    for edits in plan.places.values():
        assert edits, "a place without edits gets no hook"
        assert all(len(row_edit.rows) for row_edit in edits)
        assert all(row_edit.rows.dtype == torch.int64 for row_edit in edits)


@given(st.lists(parts(max_stack=1), max_size=6))
def test_an_adapters_weights_are_read_once_a_place(drawn: list[Part]) -> None:
    """Requests with one adapter and strength share a RowEdit, however many they are."""
    plan = build_plan(pack(drawn))
    for edits in plan.places.values():
        readers = Counter((id(row_edit.edit), row_edit.strength) for row_edit in edits)
        assert set(readers.values()) == {1}


@given(st.lists(parts(), max_size=6))
def test_stacks_read_weights_at_most_once_a_depth(drawn: list[Part]) -> None:
    plan = build_plan(pack(drawn))
    depths = max((len(part.stack) for part in drawn), default=0)
    for edits in plan.places.values():
        readers = Counter((id(row_edit.edit), row_edit.strength) for row_edit in edits)
        assert max(readers.values()) <= depths


def test_a_stack_keeps_its_order_beside_others() -> None:
    """Here the second of [4, 1] is met, as the second of [0, 1], before its first."""
    drawn = [Part(((0, 1.0), (1, 1.0)), 5, 0, 5), Part(((4, 1.0), (1, 1.0)), 5, 0, 5)]
    table = as_table(build_plan(pack(drawn)))
    assert table == brute_force(drawn)
    both = [[digest for digest, _, _ in edits] for edits in table.values() if len(edits) == 2]
    four, one, zero = (adapters()[index].digest for index in (4, 1, 0))
    assert [four, one] in both
    assert [zero, one] in both


def test_layers_that_change_the_same_rows_share_the_index() -> None:
    drawn = [Part(((0, 1.0),), 5, 0, 5), Part(((0, 1.0),), 3, 0, 3)]
    plan = build_plan(pack(drawn))
    assert [edit.rows.tolist() for edits in plan.places.values() for edit in edits] == [
        [4, 7]
    ] * NUM_LAYERS
    assert len({id(edit.rows) for edits in plan.places.values() for edit in edits}) == 1


@given(st.lists(parts(), max_size=6), st.data())
def test_a_narrowed_layer_counts_the_rows_that_go_on(
    drawn: list[Part], data: st.DataObject
) -> None:
    num_rows = sum(part.length for part in drawn)
    going_on = sorted(data.draw(st.sets(st.integers(0, max(0, num_rows - 1)))))
    narrowing = Narrowing(LAST_LAYER, {row: i for i, row in enumerate(going_on)})
    expected = {
        (layer, site, narrowing.places[row] if layer == LAST_LAYER else row): edits
        for (layer, site, row), edits in brute_force(drawn).items()
        if layer != LAST_LAYER or row in narrowing.places
    }
    assert as_table(build_plan(pack(drawn), narrowing=narrowing)) == expected


@given(parts(), st.lists(st.integers(1, 15), max_size=4))
def test_chunking_moves_no_edit(part: Part, cuts: list[int]) -> None:
    """The chunks of a prompt together edit what the whole prompt would."""
    whole = part.whole
    bounds = sorted({0, whole.length, *(cut for cut in cuts if cut < whole.length)})
    chunks = [
        Part(part.stack, part.prompt_len, start, end - start, part.prefix)
        for start, end in itertools.pairwise(bounds)
    ]
    packed = as_table(build_plan(pack(chunks)))
    assert packed == as_table(build_plan(pack([whole])))
    alone = sum(build_plan(pack([chunk])).num_edits for chunk in chunks)
    assert alone == num_triples(packed)


@given(parts())
def test_num_edits_is_what_the_plans_will_apply(part: Part) -> None:
    """Also with strength 0, which applies none."""
    (chunk,) = pack([part.whole])
    promised = chunk.edits.num_edits if chunk.edits else 0
    assert promised == build_plan([chunk]).num_edits


def prompt_edits(adapter: int, prompt_len: int) -> PromptEdits:
    return PromptEdits((AdapterUse(adapters()[adapter]),), prompt_len)


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
    edits = prompt_edits(adapter, prompt_len)
    assert edits.live_positions(0, EditKey(layer, "block_output", 0)) == live


@pytest.mark.parametrize(
    ("adapter", "site", "live"),
    [
        *((6, site, (5,)) for site in RESIDUAL[:3]),
        (7, "heads", (5,)),
        (5, KEYS, (0, 1, 2)),  # the last token attends to them
        (5, VALUES, (0, 1, 2)),
    ],
)
def test_only_sites_that_feed_logits_alone_are_pruned(
    adapter: int, site: str, live: tuple[int, ...]
) -> None:
    edits = prompt_edits(adapter, 6)
    unit = adapters()[adapter].rule.num_units - 1
    assert edits.live_positions(0, EditKey(LAST_LAYER, site, unit)) == live
    assert edits.live_positions(0, EditKey(2, site, unit)) == edits.positions[0][unit]


def test_prefix_unit_of_the_last_layer_is_dead_and_its_suffix_unit_lives() -> None:
    edits = prompt_edits(2, 6)
    assert edits.positions == (((0,), (4, 5)),)
    assert edits.live_positions(0, EditKey(3, "block_output", 0)) == ()
    assert edits.live_positions(0, EditKey(3, "block_output", 1)) == (5,)
    assert edits.num_edits == 3 + 1


@pytest.mark.parametrize(
    ("positions", "rows"), [((), []), ((0, 2), []), ((3, 5, 7, 8), [10, 12, 14]), ((8, 99), [])]
)
def test_rows_of_a_chunk(positions: tuple[int, ...], rows: list[int]) -> None:
    assert PackedChunk(row=10, first_position=3, length=5, edits=None).rows_of(positions) == rows


def test_no_adapters_no_plan() -> None:
    assert build_plan([]).places == {}
    assert build_plan(pack([Part((), 5, 0, 5), Part(((0, 0.0),), 5, 0, 5)])).places == {}


# Virtual tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1])
def test_virtual_tokens_shift_every_adapters_positions(prefix: int) -> None:
    """Wherever the prefix stands in the stack; the virtual tokens themselves are never edited."""
    virtual = prefixes()[prefix]
    shift = virtual.num_virtual_tokens
    one, two = AdapterUse(adapters()[1]), AdapterUse(adapters()[3])
    for stack in [(AdapterUse(virtual), one, two), (one, two, AdapterUse(virtual))]:
        edits = PromptEdits(stack, 6)
        assert edits.num_virtual == shift
        assert edits.prefixed is virtual
        plain = PromptEdits((one, two), 6)
        found = [edits.positions[edits.uses.index(use)] for use in (one, two)]
        expected = [tuple(tuple(p + shift for p in unit) for unit in us) for us in plain.positions]
        assert found == expected
        assert edits.live_positions(edits.uses.index(two), EditKey(3, "block_output", 0)) == (
            shift + 5,
        )
        assert edits.num_edits == plain.num_edits


def test_without_a_prefix_there_are_no_virtual_tokens() -> None:
    edits = prompt_edits(0, 6)
    assert (edits.num_virtual, edits.prefixed) == (0, None)


# Decode -----------------------------------------------------------------------------------


@given(st.lists(parts(), max_size=6))
def test_the_decode_plan_is_the_brute_force_table(drawn: list[Part]) -> None:
    """Row i is sequence i; phase all alone, with the last unit's parameters."""
    expected: Table = defaultdict(list)
    for row, part in enumerate(drawn):
        for index, strength in part.stack:
            adapter = adapters()[index]
            for key in adapter.edits:
                on_generated = index not in PROMPT_ONLY
                last_unit = adapter.rule.num_units - 1
                if strength and on_generated and key.unit == last_unit:
                    expected[key.layer, key.site, row].append((adapter.digest, strength, key))
    plan = build_decode_plan([part.edits for part in drawn])
    assert as_table(plan) == expected
    assert plan.num_edits == num_triples(expected)
    for part in drawn:
        edits = part.edits
        alone = build_decode_plan([edits])
        assert bool(edits and edits.edits_decode) == bool(alone.places)


def test_an_untied_rules_suffix_unit_edits_generated_tokens() -> None:
    plan = build_decode_plan([None, prompt_edits(7, 5), prompt_edits(0, 5), prompt_edits(7, 9)])
    assert set(plan.places) == {(2, "heads"), (LAST_LAYER, "heads")}
    for (layer, _), (row_edit,) in plan.places.items():
        assert row_edit.edit is adapters()[7].edits[EditKey(layer, "heads", 1)]
        assert row_edit.rows.tolist() == [1, 3]


def test_prompt_only_adapters_leave_decode_alone() -> None:
    rows = [prompt_edits(index, 5) for index in PROMPT_ONLY]
    assert not any(edits.edits_decode for edits in rows)
    assert build_decode_plan(rows).places == {}
    assert build_decode_plan([None, None]).places == {}
    off = PromptEdits((AdapterUse(adapters()[5], 0.0),), 5)
    assert not off.edits_decode
    assert build_decode_plan([off]).places == {}


# Subspaces --------------------------------------------------------------------------------

SUBSPACES = {"a": (0, 3), "b": (1,), "c": (2, 4, 5)}


def with_subspaces(method: str, activation: str | None = None) -> Adapter:
    return random_adapter(
        tiny_description(),
        method=method,
        rank=6,
        activation=activation,
        layers=[0, 2],
        subspaces=SUBSPACES,
    )


@pytest.mark.parametrize(
    ("method", "activation"),
    [("loreft", "identity"), ("loreft", "relu"), ("noreft", "tanh"), ("series_adapter", "relu")],
)
def test_factor_1_on_all_subspaces_is_no_scaling(method: str, activation: str) -> None:
    adapter = with_subspaces(method, activation)
    use = AdapterUse(adapter, 1.0, tuple((name, 1.0) for name in SUBSPACES))
    h = torch.randn(5, 32)
    assert AdapterUse(adapter).edits is adapter.edits
    assert set(use.edits) == set(adapter.edits)
    for key, edit in adapter.edits.items():
        assert_close(use.edits[key].delta(h), edit.delta(h))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(
    "chosen", [{"a": 1.0}, {"b": -2.0}, {"a": 0.5, "c": 3.0}, {"b": 0.0}, {"c": 1.0, "b": 0.0}]
)
def test_loreft_is_the_sum_over_the_chosen_ranks(activation: str, chosen: dict[str, float]) -> None:
    """Δ = Σⱼ fⱼ · (act(h·wⱼ + bⱼ) − h·sⱼ) · uⱼ, with f 0 for ranks of no chosen subspace."""
    adapter = with_subspaces("loreft", activation)
    before = {key: dict(edit.parts()) for key, edit in adapter.edits.items()}
    use = AdapterUse(adapter, 1.0, tuple(sorted(chosen.items())))
    factors = {rank: f for name, f in chosen.items() for rank in SUBSPACES[name]}
    h = torch.randn(5, 32)
    for key, parts_ in before.items():
        expected = torch.zeros(5, 32)
        for rank, factor in factors.items():
            inner = h @ parts_["down"][:, rank] + parts_["bias"][rank]
            if activation == "relu":
                inner = inner.relu() - h @ parts_["skip"][:, rank]
            expected += factor * inner.unsqueeze(1) * parts_["up"][rank]
        found = use.edits[key].delta(h)
        assert_close(found, expected)
        if any(chosen.values()):
            assert found.abs().max() > 1e-2
            assert (found - adapter.edits[key].delta(h)).abs().max() > 1e-2, "the rest is off"
        for part, tensor in adapter.edits[key].parts():
            assert_close(tensor, parts_[part], tolerance=0)


def test_uses_of_one_adapter_share_an_edit_only_if_alike() -> None:
    """Same digest, strength and subspaces; each use is an object of its own request."""
    adapter = with_subspaces("loreft")
    uses_ = [
        AdapterUse(adapter, 1.0, (("a", 1.0),)),
        AdapterUse(adapter, 1.0, (("a", 1.0),)),
        AdapterUse(adapter, 1.0, (("a", 2.0),)),
        AdapterUse(adapter, 2.0, (("a", 1.0),)),
        AdapterUse(adapter, 1.0),
    ]
    chunks = [PackedChunk(row, 0, 1, PromptEdits((use,), 1)) for row, use in enumerate(uses_)]
    plan = build_plan(chunks)
    for (layer, site), edits in plan.places.items():
        assert [edit.rows.tolist() for edit in edits] == [[0, 1], [2], [3], [4]]
        h = torch.randn(1, 32)
        for row_edit, use in zip(edits, [uses_[i] for i in (0, 2, 3, 4)], strict=True):
            assert row_edit.strength == use.strength
            expected = use.edits[EditKey(layer, site, 0)].delta(h)
            assert_close(row_edit.edit.delta(h), expected, tolerance=0)

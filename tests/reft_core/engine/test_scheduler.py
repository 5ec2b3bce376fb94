"""Slots stay dense, arrival decides, and a step's prefill stays within its budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_core.batch import AdapterUse, PromptEdits
from reft_core.engine.config import EngineConfig
from reft_core.engine.interface import Request, SamplingParams
from reft_core.engine.kv import SlotKV
from reft_core.engine.prefix_cache import PrefixCache
from reft_core.engine.scheduler import Scheduler
from reft_core.engine.sequence import Sequence
from tests.factories import random_prefix_adapter, tiny_description


@dataclass
class FakeKV:
    """Slots that hold a name instead of tensors, and a record of what was done to them."""

    num_slots: int
    moves: list[tuple[int, int, int]] = field(default_factory=list)
    cleared: list[tuple[int, int]] = field(default_factory=list)
    slot_len: int = 64
    num_layers: int = 4
    calls: list[str] = field(default_factory=list)

    def move(self, source: int, target: int, length: int) -> None:
        self.moves.append((source, target, length))
        self.calls.append("move")

    def clear(self, slot: int, length: int) -> None:
        self.cleared.append((slot, length))
        self.calls.append("clear")


class NoCache:
    """A prefix cache that remembers nothing."""

    def restore(self, _sequence: Sequence, beyond: int = 0) -> int:
        return 0

    def store(self, _sequence: Sequence, *, tail: bool) -> None:
        pass


def make(num_slots: int = 3, budget: int = 100) -> tuple[Scheduler, FakeKV]:
    kv = FakeKV(num_slots)
    config = EngineConfig(max_prefill_tokens=budget)
    return Scheduler(config, cast(SlotKV, kv), cast(PrefixCache, NoCache())), kv


def sequence(name: str, prompt_len: int = 4) -> Sequence:
    request = Request(name, tuple(range(3, 3 + prompt_len)), SamplingParams())
    return Sequence(request, print, None, frozenset())


def prefixed_sequence(name: str, kind: Literal["kv", "embedding"], prompt_len: int) -> Sequence:
    """One with three virtual tokens, as the engine makes it."""
    adapter = random_prefix_adapter(tiny_description(), kind, length=3)
    request = Request(name, tuple(range(3, 3 + prompt_len)), SamplingParams())
    edits = PromptEdits((AdapterUse(adapter),), prompt_len)
    return Sequence(request, print, edits, frozenset())


def names(sequences: list[Sequence]) -> str:
    return "".join(s.request.request_id for s in sequences)


def prefill(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step's chunks, which then count as computed."""
    chunks = scheduler.next_prefill()
    for chunk in chunks:
        chunk.sequence.num_computed = chunk.end
    return [(c.sequence.request.request_id, c.start, c.end) for c in chunks]


def running(prompt_lens: str = "abc", num_slots: int = 3) -> tuple[Scheduler, FakeKV]:
    """A scheduler whose slots hold prefilled sequences of these names."""
    scheduler, kv = make(num_slots)
    for name in prompt_lens:
        scheduler.add(sequence(name))
    prefill(scheduler)
    return scheduler, kv


def check_dense(scheduler: Scheduler) -> None:
    assert [s.slot for s in scheduler.running] == list(range(len(scheduler.running)))
    assert all(s.slot == -1 for s in scheduler.waiting)


def test_slots_go_by_arrival() -> None:
    scheduler, _ = make(num_slots=2)
    assert not scheduler.has_work
    for name in "abcd":
        scheduler.add(sequence(name))
    assert scheduler.has_work
    assert prefill(scheduler) == [("a", 0, 4), ("b", 0, 4)]
    assert names(scheduler.running) == "ab"
    assert names(list(scheduler.waiting)) == "cd"
    check_dense(scheduler)
    assert prefill(scheduler) == [], "nothing new fits, and nothing is left to prefill"
    scheduler.remove(scheduler.running[0])
    assert prefill(scheduler) == [("c", 0, 4)]
    assert names(scheduler.running) == "bc"
    check_dense(scheduler)


@pytest.mark.parametrize(
    ("budget", "prompt_lens", "steps"),
    [
        (100, [4, 3], [[("a", 0, 4), ("b", 0, 3)]]),
        (4, [4, 3], [[("a", 0, 4)], [("b", 0, 3)]]),
        (5, [4, 3], [[("a", 0, 4), ("b", 0, 1)], [("b", 1, 3)]]),
        (3, [7], [[("a", 0, 3)], [("a", 3, 6)], [("a", 6, 7)]]),
        (1, [2, 1], [[("a", 0, 1)], [("a", 1, 2)], [("b", 0, 1)]]),
        (4, [6, 1, 5], [[("a", 0, 4)], [("a", 4, 6), ("b", 0, 1), ("c", 0, 1)], [("c", 1, 5)]]),
    ],
)
def test_a_steps_prefill_stays_within_its_budget(
    budget: int, prompt_lens: list[int], steps: list[list[tuple[str, int, int]]]
) -> None:
    """The oldest first; a prompt that does not fit is cut."""
    scheduler, _ = make(budget=budget)
    for name, length in zip("abc", prompt_lens, strict=False):
        scheduler.add(sequence(name, length))
    for expected in steps:
        assert prefill(scheduler) == expected
    assert prefill(scheduler) == []


def test_a_chunk_knows_whether_it_completes_the_prompt() -> None:
    scheduler, _ = make(budget=3)
    scheduler.add(sequence("a", 5))
    completes = []
    for _ in range(2):
        (chunk,) = scheduler.next_prefill()
        completes.append(chunk.completes_prompt)
        chunk.sequence.num_computed = chunk.end
    assert completes == [False, True]


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("embedding", [[("a", 0, 4)], [("a", 4, 7), ("b", 0, 1)], [("b", 1, 2)]]),
        ("kv", [[("a", 3, 7)], [("b", 0, 2)]]),
    ],
)
def test_virtual_embeddings_are_prefilled_and_virtual_keys_are_not(
    kind: Literal["kv", "embedding"], steps: list[list[tuple[str, int, int]]]
) -> None:
    scheduler, kv = make(budget=4)
    first = prefixed_sequence("a", kind, 4)
    assert (first.num_virtual, first.prompt_end, first.num_generated) == (3, 7, 0)
    scheduler.add(first)
    scheduler.add(sequence("b", 2))
    for expected in steps:
        assert not first.is_prefilled or expected == steps[-1]
        assert prefill(scheduler) == expected
    assert first.is_prefilled
    first.token_ids.append(50)
    assert (first.num_generated, first.generated_ids) == (1, [50])
    scheduler.remove(first)
    assert kv.cleared[0] == (0, 3 + 4 + 1 + 1)


def test_decode_takes_rows_up_to_the_last_ready_one() -> None:
    scheduler, _ = make(budget=5)
    assert scheduler.next_decode() == []
    for name, length in [("a", 4), ("b", 9), ("c", 1)]:
        scheduler.add(sequence(name, length))
    prefill(scheduler)
    assert names(scheduler.next_decode()) == "a", "b has one token of nine"
    scheduler.running[2].num_computed = 1
    assert names(scheduler.next_decode()) == "abc", "b's row is in between, and idle"
    scheduler.remove(scheduler.running[0])
    assert names(scheduler.next_decode()) == "c"
    check_dense(scheduler)


@pytest.mark.parametrize(
    ("removed", "left", "moves"),
    [
        (0, "cb", [(2, 0, 4)]),
        (1, "ac", [(2, 1, 4)]),
        (2, "ab", []),
    ],
)
def test_the_last_sequence_moves_into_a_freed_slot(
    removed: int, left: str, moves: list[tuple[int, int, int]]
) -> None:
    """The freed slot is zeroed before, and the one left behind after; five tokens each, since
    an idle row stores one token ahead.
    """
    scheduler, kv = running()
    gone = scheduler.running[removed]
    scheduler.remove(gone)
    assert gone.slot == -1
    assert names(scheduler.running) == left
    assert kv.moves == moves
    check_dense(scheduler)
    if moves:
        assert kv.cleared == [(removed, 5), (2, 5)]
        assert kv.calls == ["clear", "move", "clear"], "the mover must survive"
    else:
        assert kv.cleared == [(removed, 5)]
        assert kv.calls == ["clear"]


def test_no_more_is_cleared_than_a_slot_holds() -> None:
    scheduler, kv = make(num_slots=1)
    full = sequence("a", 60)
    scheduler.add(full)
    prefill(scheduler)
    full.token_ids += [5, 6, 7, 8]
    scheduler.remove(full)
    assert kv.cleared == [(0, 64)]


def test_only_the_computed_tokens_move() -> None:
    scheduler, kv = make(budget=6)
    scheduler.add(sequence("a", 4))
    scheduler.add(sequence("b", 9))
    prefill(scheduler)
    scheduler.remove(scheduler.running[0])
    assert kv.moves == [(1, 0, 2)]
    assert kv.cleared == [(0, 5), (1, 10)]


def test_a_waiting_sequence_leaves_the_others_in_order() -> None:
    scheduler, kv = running()
    for name in "def":
        scheduler.add(sequence(name))
    scheduler.remove(list(scheduler.waiting)[1])
    assert names(list(scheduler.waiting)) == "df"
    assert names(scheduler.running) == "abc"
    assert kv.calls == []


def test_a_move_does_not_change_who_is_prefilled_first() -> None:
    """b, admitted before c, stays ahead although c moved into slot 0."""
    scheduler, _ = make(budget=4)
    for name, length in [("a", 4), ("b", 6), ("c", 6)]:
        scheduler.add(sequence(name, length))
    assert prefill(scheduler) == [("a", 0, 4)]
    scheduler.remove(scheduler.running[0])
    assert names(scheduler.running) == "cb"
    assert prefill(scheduler) == [("b", 0, 4)]
    assert prefill(scheduler) == [("b", 4, 6), ("c", 0, 2)]


@given(st.data())
def test_any_history_keeps_the_slots_dense(data: st.DataObject) -> None:
    """Adds, steps and removals in any order; every sequence is prefilled exactly once."""
    scheduler, kv = make(num_slots=3, budget=5)
    alive: list[Sequence] = []
    held: dict[int, Sequence] = {}
    for number in range(25):
        action = data.draw(st.sampled_from(["add", "step", "step", "remove"]))
        if action == "add":
            alive.append(sequence(f"{number}", data.draw(st.integers(1, 9))))
            scheduler.add(alive[-1])
        elif action == "step":
            before = {id(s): s.num_computed for s in alive}
            chunks = scheduler.next_prefill()
            assert sum(chunk.end - chunk.start for chunk in chunks) <= 5
            for chunk in chunks:
                assert chunk.start == before[id(chunk.sequence)]
                chunk.sequence.num_computed = chunk.end
            unfinished = any(not s.is_prefilled for s in scheduler.running)
            assert chunks or not unfinished
        elif alive:
            gone = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            kv.moves.clear()
            kv.cleared.clear()
            was = gone.slot
            scheduler.remove(gone)
            stored = {slot: len(s.token_ids) + 1 for slot, s in held.items()}
            freed = {was} | {source for source, _, _ in kv.moves} if was >= 0 else set()
            assert dict(kv.cleared) == {slot: stored[slot] for slot in freed}
            for source, target, length in kv.moves:
                assert held[source].num_computed == length
                assert scheduler.running[target] is held[source]
        check_dense(scheduler)
        held = dict(enumerate(scheduler.running))
        assert {id(s) for s in alive} == {id(s) for s in (*scheduler.running, *scheduler.waiting)}
        assert len(scheduler.running) <= kv.num_slots
        assert scheduler.has_work == bool(alive)

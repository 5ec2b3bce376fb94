"""Slots go to the most urgent, then to whom was served least."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from reft_core.engine.fairness import FairQueue
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.sequence import Sequence


def sequence(
    name: str, adapter: str = "", *, tenant: str = "", priority: int = 0, length: int = 10
) -> Sequence:
    choices = (AdapterChoice(adapter),) if adapter else ()
    request = Request(
        name, (5,) * length, SamplingParams(), choices, tenant=tenant, priority=priority
    )
    return Sequence(request, print, None, frozenset())


def queue_of(sequences: Iterable[Sequence]) -> FairQueue:
    queue = FairQueue()
    for waiting in sequences:
        queue.add(waiting)
    return queue


def served(queue: FairQueue) -> list[str]:
    """The order in which slots would be given, each charged its prompt."""
    order = []
    while next_one := queue.peek():
        queue.take(next_one)
        queue.charge(next_one, len(next_one.token_ids))
        order.append(next_one.request.request_id)
    return order


def test_a_flood_does_not_hold_up_the_rare() -> None:
    flood = [sequence(f"flood-{i}", "popular") for i in range(50)]
    rare = [sequence("base"), sequence("rare", "rare"), sequence("other", "popular", tenant="t")]
    order = served(queue_of([*flood, *rare]))
    assert max(order.index(s.request.request_id) for s in rare) <= 3
    assert [name for name in order if "flood" in name] == [f"flood-{i}" for i in range(50)]


def test_long_prompts_count_for_more() -> None:
    long = [sequence(f"long-{i}", "a", length=30) for i in range(3)]
    short = [sequence(f"short-{i}", "b", length=10) for i in range(9)]
    order = served(queue_of([*long, *short]))
    assert [order.index(f"long-{i}") for i in range(3)] == [0, 4, 8]


def test_no_priority_of_one_tenant_holds_up_another() -> None:
    flood = [sequence(f"flood-{i}", tenant="pushy", priority=-1000 - i) for i in range(50)]
    order = served(queue_of([*flood, sequence("patient", tenant="other", priority=7)]))
    assert order.index("patient") <= 2
    pushy = [name for name in order if "flood" in name]
    assert pushy == [f"flood-{i}" for i in reversed(range(50))], "among its own it does"


def test_priority_comes_before_fairness() -> None:
    order = served(
        queue_of([sequence("later", priority=1), sequence("now", priority=-1), sequence("soon")])
    )
    assert order == ["now", "soon", "later"]


def test_who_ran_before_comes_before_who_did_not() -> None:
    queue = queue_of([sequence("new"), back := sequence("back", "a")])
    queue.take(back)
    queue.charge(back, 1000)
    back.admitted_at = 1.0
    queue.put_back(back)
    assert served(queue) == ["back", "new"]


def test_a_pause_earns_no_credit() -> None:
    """Whoever was away starts level with the others, however much those were served."""
    queue = queue_of([busy := sequence("busy-0", "a")])
    queue.take(busy)
    queue.charge(busy, 10_000)
    for name in ("busy-1", "busy-2"):
        queue.add(sequence(name, "a"))
    for name in ("fresh-1", "fresh-2"):
        queue.add(sequence(name, "b"))
    assert served(queue) == ["busy-1", "fresh-1", "busy-2", "fresh-2"]


def test_a_flow_without_sequences_is_forgotten() -> None:
    queue = queue_of(gone := [sequence(str(i), f"adapter-{i}") for i in range(5)])
    for one in gone:
        queue.take(one)
        queue.leave(one)
    assert (len(queue), list(queue), queue.peek()) == (0, [], None)
    assert not queue._served
    assert not queue._present
    assert not queue._waiting


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), min_size=1, max_size=40))
def test_flows_that_wait_are_served_alike(asks: list[tuple[str, int]]) -> None:
    """While two flows both wait, the tokens served to them differ by one prompt at most."""
    waiting = [sequence(str(i), flow, length=n) for i, (flow, n) in enumerate(asks)]
    queue = queue_of(waiting)
    tokens = dict.fromkeys("abc", 0)
    while next_one := queue.peek():
        present = {s.request.adapters[0].digest for s in queue}
        assert max(tokens[f] for f in present) - min(tokens[f] for f in present) <= 40
        queue.take(next_one)
        queue.charge(next_one, len(next_one.token_ids))
        tokens[next_one.request.adapters[0].digest] += len(next_one.token_ids)

"""Requests by adapter: who has a series, and that there are never more than so many."""

from __future__ import annotations

import random

import pytest

from server.observability.adapter_usage import BASE, OTHER, AdapterUsage


def key(name: object) -> tuple[str, str]:
    return ("", str(name))


def ask(usage: AdapterUsage, name: object, times: int = 1) -> None:
    for _ in range(times):
        usage.begin([key(name)])
        usage.end([key(name)])


def counts(usage: AdapterUsage) -> dict[str, float]:
    families = {family.name: family for family in usage.collect()}
    return {s.labels["adapter"]: s.value for s in families["reft_adapter_requests"].samples}


def test_the_first_names_have_a_series_each_and_the_rest_share_one():
    usage = AdapterUsage(2)
    for name in ("a", "b", "c", "a", "d"):
        ask(usage, name)
    usage.begin([])
    assert counts(usage) == {"a": 2, "b": 1, OTHER: 2, BASE: 1}
    assert usage.label([key("a")]) == "a"
    assert usage.label([key("c"), key("a")]) == OTHER
    assert usage.label([]) == BASE


def test_a_name_asked_for_more_than_twice_as_often_takes_the_place_of_the_least():
    usage = AdapterUsage(2)
    ask(usage, "a", 5)
    ask(usage, "b", 2)
    ask(usage, "c", 4)
    assert "c" not in counts(usage)
    ask(usage, "c", 3)
    assert counts(usage) == {"a": 5, "c": 2, OTHER: 5, BASE: 0}


def test_no_counter_falls_but_by_ending():
    usage = AdapterUsage(3)
    rng = random.Random(0)
    before: dict[str, float] = {}
    for turn in range(3000):
        ask(usage, min(int(rng.expovariate(0.2)), 40) + (turn // 1000) * 7)
        now = counts(usage)
        assert len(now) <= 3 + 2
        for name in before.keys() & now.keys():
            assert now[name] >= before[name], name
        before = now
    assert len(usage._candidates) <= 4 * 3


def test_equals_never_change_places():
    usage = AdapterUsage(3)
    for _ in range(2000):
        for name in range(12):
            ask(usage, name)
    assert set(counts(usage)) == {"0", "1", "2", OTHER, BASE}


def test_a_name_that_became_hot_gets_in_however_hot_others_once_were():
    usage = AdapterUsage(1)
    ask(usage, "old", 100_000)
    ask(usage, "new", 1500)
    assert "new" in counts(usage)


def test_names_of_deleted_adapters_leave():
    usage = AdapterUsage(2)
    ask(usage, "a")
    ask(usage, "b")
    usage.forget("a")
    usage.forget("never seen")
    assert counts(usage) == {"b": 1, OTHER: 0, BASE: 0}
    ask(usage, "c")
    assert counts(usage) == {"b": 1, "c": 1, OTHER: 0, BASE: 0}


def test_none_by_name():
    usage = AdapterUsage(0)
    ask(usage, "a", 3)
    assert counts(usage) == {OTHER: 3, BASE: 0}


def test_tenants_with_one_name_are_two():
    usage = AdapterUsage(5)
    usage.begin([("x", "tone")])
    usage.begin([("y", "tone")])
    (requests, in_use, _) = usage.collect()
    assert [s.value for s in requests.samples if s.labels["adapter"] == "tone"] == [1, 1]
    assert in_use.samples[0].value == 2


@pytest.mark.parametrize("ended", [False, True])
def test_adapters_in_use(ended):
    usage = AdapterUsage(5)
    usage.begin([key("a"), key("b")])
    usage.begin([key("a")])
    usage.end([key("a")])
    if ended:
        usage.end([key("a"), key("b")])
    _, in_use, info = usage.collect()
    assert in_use.samples[0].value == (0 if ended else 2)
    assert info.samples[0].labels["running_lora_adapters"] == ("" if ended else "a,b")

"""The soak itself, short; and that it would notice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.soak.audit import compare, find_leaks
from benchmarks.soak.names import NameHistory
from benchmarks.soak.oracle import Case, Observed, Oracle
from benchmarks.soak.run import Options, run
from benchmarks.soak.server import Footprint
from benchmarks.soak.world import TINY, World, make_world
from reft_core.loading import load_model
from tests.reference.slow import reference_generate

TOKENS = 8


def test_seconds_of_everything_lose_nothing() -> None:
    """As ``make soak`` does for ten minutes."""
    summary = run(Options(seconds=8))
    for problem in ("lost", "wrong"):
        assert summary[problem] == 0, summary
    assert summary["leaks"] == [], summary
    for end in ("answered", "refused", "cancelled", "checked", "cold_loads", "cached_tokens"):
        assert summary[end] > 0, summary
    assert summary["distinct"] > 0.7 * summary["cases"], summary


# What it would notice -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(TINY, tmp_path_factory.mktemp("world"), num_files=8, seed=1)


@pytest.fixture
def oracle(world: World) -> Iterator[Oracle]:
    oracle = Oracle(world.loaded, world.adapters, TOKENS, 64)
    oracle.start()
    yield oracle
    oracle.finish()


def test_the_oracle_is_the_slow_reference(world: World, oracle: Oracle, tmp_path: Path) -> None:
    """For every kind of adapter, and for the base model."""
    untouched = load_model(world.model)
    cases = [Case((), (5, 6, 7))]
    cases += [Case(((digest, None),), tuple(range(9, 25))) for digest in world.adapters]
    solos = [oracle.solo(case) for case in cases]
    for case, solo in zip(cases, solos, strict=True):
        adapter = world.adapters[case.adapters[0][0]] if case.adapters else None
        expected = reference_generate(untouched.model, case.prompt, TOKENS, adapter)
        if solo.ended:
            assert expected[len(solo.token_ids)] in untouched.eos_token_ids
            expected = expected[: len(solo.token_ids)]
        assert solo.token_ids == expected
    assert oracle.num_distinct > 0.7 * len(cases)


def test_the_oracle_knows_right_from_wrong(world: World, oracle: Oracle) -> None:
    def text_of(case: Case) -> str:
        return oracle._decode(oracle.solo(case).token_ids)

    one, other = list(world.adapters)[:2]
    for first in range(90):  # until an answer is as long as it may be
        mine, others = (Case(((digest, None),), (first, 40, 41)) for digest in (one, other))
        text = text_of(mine)
        if len(text) == TOKENS and len(set(text)) == TOKENS:
            break
    assert len(text) == TOKENS
    assert text_of(others) not in ("", text)
    whole = Observed(mine, text, TOKENS, None, "length")
    stop = text[4]
    before = text[: text.index(stop)]
    right = [
        whole,
        replace(whole, text=text[:3], max_tokens=3),
        replace(whole, text=text[:3], finish_reason=None),
        replace(whole, text="", finish_reason=None),
        replace(whole, text=before, stop=stop, finish_reason="stop"),
    ]
    wrong = [
        replace(whole, text=text_of(others)),
        replace(whole, case=others),
        replace(whole, text=text[:3]),
        replace(whole, text=text + "x"),
        replace(whole, text="", finish_reason="stop"),
        replace(whole, finish_reason="stop"),
        replace(whole, text=text[1:4], finish_reason=None),
        replace(whole, stop=stop),
    ]
    for observed in (*right, *wrong):
        oracle._judge(observed)
    assert oracle.num_ties == 0
    assert oracle.num_checked == len(right) + len(wrong)
    assert len(oracle.wrong) == len(wrong)


def test_what_a_name_may_have_meant() -> None:
    history = NameHistory()
    assert history.possible(0, 1) == {None}
    change = history.begin("a", 10.0)
    assert history.possible(5, 9) == {None}
    assert history.possible(9, 11) == {None, "a"}
    assert history.possible(12, 13) == {None, "a"}  # still on its way
    change.ended_at = 20.0
    assert history.possible(15, 19) == {None, "a"}
    assert history.possible(21, 22) == {"a"}
    history.begin("b", 30.0).ended_at = 31.0
    history.begin(None, 40.0).ended_at = 41.0
    assert history.possible(21, 29) == {"a"}
    assert history.possible(25, 45) == {"a", "b", None}
    assert history.possible(32, 39) == {"b"}
    assert history.possible(42, math.inf) == {None}
    assert history.current is None


AT_REST = {
    "reft_prefix_cache_blocks": 7.0,
    "reft_prefix_cache_blocks_free": 3.0,
    "reft_prefix_cache_blocks_max": 10.0,
    "reft_adapter_resident_bytes": 90.0,
    "reft_adapter_budget_bytes": 100.0,
    "reft_adapters_pinned": 1.0,
    "reft_adapter_references": 1.0,
    "reft_adapters_waiting": 0.0,
    "reft_num_requests_running": 0.0,
    "reft_num_requests_waiting": 0.0,
    "reft_kv_cache_usage_perc": 0.0,
}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"reft_num_requests_running": 1.0}, ["1 slots in use"]),
        ({"reft_num_requests_waiting": 2.0}, ["2 requests waiting"]),
        ({"reft_adapter_references": 3.0}, ["2 uses of adapters"]),
        ({"reft_adapters_waiting": 1.0}, ["1 adapters waiting for room"]),
        ({"reft_prefix_cache_blocks_free": 2.0}, ["1 prefix cache blocks neither held nor free"]),
        ({"reft_adapter_resident_bytes": 101.0}, ["1 bytes of adapters beyond the budget"]),
    ],
)
def test_leaks_that_the_metrics_show(changed: dict[str, float], found: list[str]) -> None:
    assert find_leaks(AT_REST | changed) == found


def test_leaks_that_the_system_shows() -> None:
    before = Footprint(rss_mb=300, num_threads=10, num_files=30)
    assert compare(before, Footprint(310, 12, 32), max_growth_mb=24) == []
    assert len(compare(before, Footprint(330, 40, 90), max_growth_mb=24)) == 3
    assert compare(before, None, max_growth_mb=24) == []

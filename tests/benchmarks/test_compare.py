from __future__ import annotations

from typing import Any

import pytest

from benchmarks import compare, report
from benchmarks.compare import Loaded, Outcome, run_workload
from benchmarks.gate import TIE, gate
from benchmarks.peers.contenders import OURS, STATIC, Variant
from benchmarks.peers.protocol import PeerMissing
from benchmarks.workloads import WORKLOADS, Workload

WORKLOAD = Workload("a", (4, 4), 3)
PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8]]


class FakeWorker:
    """Takes as long as it is told, in the order it is told; fails when that is used up."""

    def __init__(self, seconds: list[float], gap: float = 0.0, short: bool = False) -> None:
        self.seconds, self.gap, self.short = list(seconds), gap, short
        self.settings: list[dict[str, Any]] = []

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        if op == "score":
            return {"gaps": [0.0, self.gap]}
        if not self.seconds:
            raise PeerMissing("it broke")
        self.settings.append(arguments["settings"])
        count = arguments["output_tokens"] - self.short
        return {"seconds": self.seconds.pop(0), "tokens": [[7] * count] * 2}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_SETTLE_S", 0)


def entrant(peer: str, worker: FakeWorker, label: str = "", **runs: Any) -> Loaded:
    variant = Variant(peer, label, "no.module", runs=runs)
    return Loaded(variant, worker, {})  # type: ignore[arg-type]


def test_repeats_are_paired_and_the_warm_up_is_not_counted() -> None:
    ours = entrant(OURS, FakeWorker([99, 1, 2, 4]))
    theirs = entrant("vllm", FakeWorker([99, 2, 3, 4]))
    outcome = Outcome()
    run_workload(WORKLOAD, PROMPTS, [ours, theirs], outcome, repeats=3, trials=1)
    measured = outcome.measured["a"]
    assert measured["vllm"].seconds == [2, 3, 4]
    row = report.compared("a", measured)["vllm"]
    assert row["ours_over_theirs"] == [1.0, 1.5, 2.0]
    rates = [WORKLOADS["a"].num_generated / seconds for seconds in (4, 3, 2)]
    assert row["tokens_per_s"] == [round(rate, 1) for rate in rates]


def test_the_fastest_variant_and_setting_is_compared() -> None:
    eager = FakeWorker([9, 3])
    compiled = FakeWorker([9, 9, 5, 2, 2, 2])
    entrants = [
        entrant("vllm", eager, "eager"),
        entrant("vllm", compiled, "compiled", a=({"wave": 1}, {"wave": 2})),
    ]
    outcome = Outcome()
    run_workload(WORKLOAD, PROMPTS, entrants, outcome, repeats=2, trials=1)
    measured = outcome.measured["a"]["vllm"]
    assert measured.option == "compiled wave=2"
    assert measured.seconds == [2, 2]
    assert measured.tried == {"eager": 3, "compiled wave=1": 5, "compiled wave=2": 2}
    assert compiled.settings[-1] == {"wave": 2}


def test_a_peer_that_fails_is_missing_and_never_a_win() -> None:
    ours = entrant(OURS, FakeWorker([1, 1, 1]))
    broken = entrant("vllm", FakeWorker([1, 1]))
    hasty = entrant("llamacpp", FakeWorker([1], short=True))
    outcome = Outcome()
    run_workload(WORKLOAD, PROMPTS, [ours, broken, hasty], outcome, repeats=2, trials=0)
    assert set(outcome.measured["a"]) == {OURS}
    assert outcome.missing["vllm"] == "workload a: it broke"
    assert "not every answer has 3 tokens" in outcome.missing["llamacpp"]
    document = {"throughput": report.throughput({"bfloat16": outcome})}
    figures = report.summary(document)
    assert figures["vs_vllm_bf16"] is None
    assert figures["vs_llamacpp_bf16"] is None
    assert "missing: vllm" in report.table(document)


def test_a_slow_peer_has_fewer_repeats() -> None:
    ours = entrant(OURS, FakeWorker([1] * 6))
    slow = entrant(STATIC, FakeWorker([60.0] * 6))
    outcome = Outcome()
    run_workload(WORKLOAD, PROMPTS, [ours, slow], outcome, repeats=5, trials=0)
    assert len(outcome.measured["a"][OURS].seconds) == 5
    assert len(outcome.measured["a"][STATIC].seconds) == 2
    assert report.compared("a", outcome.measured["a"])[STATIC]["ours_over_theirs"] == [60.0] * 3


def test_where_all_are_slow_their_first_runs_decide() -> None:
    worker = FakeWorker([50, 40, 39, 38])
    entrants = [entrant("llamacpp", worker, a=({"wave": 1}, {"wave": 2}))]
    outcome = Outcome()
    run_workload(WORKLOAD, PROMPTS, entrants, outcome, repeats=2, trials=1)
    measured = outcome.measured["a"]["llamacpp"]
    assert measured.option == "wave=2"
    assert measured.tried == {"wave=1": 50, "wave=2": 40}
    assert measured.seconds == [39, 38]


def test_a_workload_may_be_left_out() -> None:
    ours = entrant(OURS, FakeWorker([1, 1]))
    absent = entrant(STATIC, FakeWorker([]), a=())
    outcome = Outcome()
    run_workload(WORKLOAD, PROMPTS, [ours, absent], outcome, repeats=1, trials=1)
    assert set(outcome.measured["a"]) == {OURS}
    assert not outcome.missing


@pytest.mark.parametrize(("gap", "passes"), [(TIE / 2, True), (TIE * 2, False)])
def test_gate_allows_ties_alone(gap: float, passes: bool) -> None:
    measured = {
        OURS: compare.Measured("default", tokens=[[1, 2], [3, 4]]),
        STATIC: compare.Measured("default", tokens=[[1, 2], [3, 5]]),
    }
    passed, verdicts = gate(FakeWorker([], gap), PROMPTS, measured)  # type: ignore[arg-type]
    assert passed is passes
    assert verdicts[OURS]["equal"] == 1


def test_gate_fails_where_nothing_can_be_judged() -> None:
    assert not gate(None, PROMPTS, {})[0]

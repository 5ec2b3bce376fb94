"""The headline command: what it runs, what it saves, and what its last line holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine, provenance, report
from benchmarks.peers.contenders import VARIANTS
from benchmarks.peers.protocol import Worker
from benchmarks.plan import FULL, HEADLINE, QUICK, TAX_COUNTS, Plan
from benchmarks.soak.world import save_tiny_model

FIGURES = {
    "vs_vllm_bf16",
    "vs_llamacpp_bf16",
    "vs_llamacpp_f32",
    "vs_transformers_static_bf16",
    "decode_over_roofline",
    "prefill_fraction_of_peak",
    "tax_1",
    "tax_16",
    "tax_64",
    "tax_256",
    "itl_ratio_256",
    "registered_10k_ratio",
    "fanout_16",
    "cold_load_ms",
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (engine, provenance):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_plans_name_what_there_is(plan: Plan) -> None:
    assert set(plan.expected_s) <= set(engine.SECTIONS)
    assert set(plan.variants) == set(plan.repeats)
    names = {variant.name for variant in VARIANTS}
    for dtype, variants in plan.variants.items():
        assert set(variants) <= names
        assert "reft" in variants
        assert HEADLINE in plan.repeats[dtype]


def test_the_full_plan_leaves_nothing_out() -> None:
    assert set(FULL.expected_s) == set(engine.SECTIONS)
    assert {tuple(sorted(repeats)) for repeats in FULL.repeats.values()} == {tuple("abcd")}
    assert FULL.tax.adapters == TAX_COUNTS
    assert FULL.tax.requests >= max(TAX_COUNTS)


def test_the_last_line_has_every_figure() -> None:
    figures = report.summary({})
    assert set(figures) >= FIGURES
    assert set(figures.values()) == {None}


def test_figures_come_from_the_other_commands_own_last_lines() -> None:
    cold = {"median": 1.5, "p95": 2.0, "max": 3.0}
    residency = {"registered_10k_ratio": 0.99, "cold_load_cached_ms": cold}
    figures = report.summary({"residency": residency, "fanout": {"fanout_16": 1.2}})
    assert figures["registered_10k_ratio"] == 0.99
    assert figures["cold_load_ms"] == 1.5
    assert figures["fanout_16"] == 1.2


def test_a_section_that_breaks_leaves_the_others_and_all_is_saved_at_once(
    tmp_path: Path, results: Path
) -> None:
    save_tiny_model(tmp_path / "model", seed=0)
    bench = engine.Bench(str(tmp_path / "model"), 1, QUICK, ["One two."], {"commit": "abc"})

    def found() -> None:
        bench.document["fanout"] = {"fanout_16": 1.5}

    def broken() -> None:
        raise RuntimeError("out of memory")

    bench.section("fanout", found)
    saved = read(results / "engine-partial.json")
    assert saved["commit"] == "abc"
    assert saved["summary"]["fanout_16"] == 1.5
    bench.section("tax", broken)
    saved = read(results / "engine-partial.json")
    assert saved["errors"] == {"tax": "RuntimeError: out of memory"}
    assert saved["summary"]["fanout_16"] == 1.5


def test_throughput_is_saved_workload_by_workload(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in the second workload has the first."""
    save_tiny_model(tmp_path / "model", seed=0)
    bench = engine.Bench(str(tmp_path / "model"), 1, FULL, ["One two."], {})
    monkeypatch.setattr(engine, "VARIANTS", ())
    done: list[str] = []

    def run_workload(workload: Any, *_: Any, **__: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(workload.name)

    monkeypatch.setattr(engine, "run_workload", run_workload)
    with pytest.raises(KeyboardInterrupt):
        bench.section("throughput", lambda: bench.throughput([]))
    assert list(read(results / "engine-partial.json")["throughput"]) == ["bfloat16"]


def test_names_of_result_files() -> None:
    everything = list(FULL.expected_s)
    assert engine.result_name(FULL, everything, [], []) == "engine-full"
    assert engine.result_name(QUICK, list(QUICK.expected_s), [], []) == "engine-quick"
    assert engine.result_name(QUICK, ["tax"], [], []) == "engine-quick-tax"
    assert engine.result_name(FULL, everything, ["c"], ["vllm"]) == "engine-full-c-vllm"


def test_quick_command_from_end_to_end(
    tmp_path: Path,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All sections stubbed: one line for each ahead of time, one JSON line at the end."""
    save_tiny_model(tmp_path / "model", seed=0)

    def passed(bench: engine.Bench, peers: list[str]) -> None:
        bench.document["gate"] = {"passed": True}

    monkeypatch.setattr(engine.Bench, "throughput", passed)
    monkeypatch.setattr(engine.Bench, "tax", lambda bench: None)
    monkeypatch.setattr(engine.Bench, "roofline", lambda bench: None)
    monkeypatch.setattr(Worker, "__init__", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr("sys.argv", ["engine.py", "--quick", "--model", str(tmp_path / "model")])
    engine.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("about ")
    figures = json.loads(lines[-1])
    assert figures["gate"] is True
    assert set(figures) >= FIGURES
    assert read(results / "engine-quick.json")["summary"] == figures
    assert not (results / "engine-partial.json").exists()

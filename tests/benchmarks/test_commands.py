"""Every command of the engine alone runs from end to end, gates included, on a tiny model."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import forward, provenance, roofline
from benchmarks.soak.world import save_tiny_model
from reft_core.threads import run_in_own_thread


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    run_in_own_thread(lambda: save_tiny_model(folder, seed=0))
    return str(folder)


@pytest.mark.parametrize(
    ("command", "options", "result", "figures"),
    [
        (
            "adapter_tax",
            "--requests 3 --input-tokens 20 --output-tokens 4 --rank 2 --repeats 1 --adapters 1 3",
            "engine-tax-float32",
            {"tax_1", "tax_3"},
        ),
        (
            "fanout",
            "--input-tokens 40 --rank 2 --repeats 1 --cases suffix",
            "engine-fanout-float32",
            {"fanout_16"},
        ),
        (
            "kernel",
            "--size 16 --ranks 2 --adapters 1 3 --repeats 1",
            "engine-kernel",
            {"edit_share_prefill_bf16", "why"},
        ),
        (
            "forward",
            "--dtype float32 --repeats 1",
            "engine-forward-float32",
            {"decode B=1", "decode B=16", "prefill 2x40"},
        ),
    ],
)
def test_command(
    command: str,
    options: str,
    result: str,
    figures: set[str],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.setattr(forward, "CONTEXT", 20)
    monkeypatch.setattr(forward, "PROMPTS", ((2, 40),))
    arguments = [*options.split(), "--model", model, "--threads", "1"]
    monkeypatch.setattr("sys.argv", [f"{command}.py", *arguments])
    module: Any = importlib.import_module(f"benchmarks.{command}")
    run_in_own_thread(module.main)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(summary) == figures
    assert all(summary.values()), "nothing measured takes no time"
    saved = json.loads((tmp_path / f"{result}.json").read_text())
    assert saved["command"].startswith(f"python -m benchmarks.{command} ")
    assert {"commit", "cpu", "torch"} <= set(saved)


def test_roofline(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_READ_BYTES", 2**20)
    monkeypatch.setattr(roofline, "_PREFILL_TOKENS", 100)
    monkeypatch.setattr(roofline, "_OUTPUT_TOKENS", 4)
    found = roofline.measure(model, "float32", 1, repeats=1)
    assert {"decode_over_roofline", "prefill_fraction_of_peak"} <= set(found)
    assert all(math.isfinite(value) for value in found.values())

"""The GPU benchmark runs from end to end, and says so where there is nothing to measure."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_smoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts run on a tiny model, on the device there is; nothing is saved."""
    monkeypatch.setattr("sys.argv", ["gpu.py", "--smoke"])
    monkeypatch.setattr(gpu, "save", lambda *_args: pytest.fail("saved"))
    assert gpu.main() == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts: dict[str, Any] = document["results"]
    assert list(parts) == ["gate", "decode", "prefill", "tax", "edits_us", "cold_load"]
    assert parts["decode"]["same_tokens"] == 1
    assert set(parts["tax"]) == {"K=0", "K=1", "K=3"}


def test_a_part_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("sys.argv", ["gpu.py", "--smoke"])
    for part in ("decode", "prefill", "tax", "edits"):
        monkeypatch.setattr(gpu, part, fails)
    assert gpu.main() == 1
    parts = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert parts["tax"] == {"error": "RuntimeError: out of memory"}
    assert "on_device_ms" in parts["cold_load"]


def test_other_tokens_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.random_llama
    made = []

    def another(*args: Any, **kwargs: Any) -> Any:
        loaded = real(*args, **kwargs)
        made.append(loaded)
        if len(made) == 2:
            loaded.model.get_output_embeddings().weight.data.neg_()
        return loaded

    monkeypatch.setattr(gpu, "random_llama", another)
    with pytest.raises(SystemExit, match="correctness gate: auto, graphs gives other tokens"):
        gpu.gate(torch.device("cpu"))

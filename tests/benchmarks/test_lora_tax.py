"""What adapters cost the peers: ratios of each to itself, and peers that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import lora_tax, report
from benchmarks.peers.contenders import Variant
from benchmarks.peers.protocol import PeerMissing

SECONDS = {0: 2.0, 1: 2.5, 2: 4.0}


class FakeWorker:
    """Takes longer the more adapters there are, and far longer the first time."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        adapters = arguments["adapters"]
        first = adapters not in self.known
        self.known.add(adapters)
        tokens = [[min(adapters, 1)] * arguments["output_tokens"] for _ in arguments["prompts"]]
        return {"seconds": 100.0 if first else SECONDS[adapters], "tokens": tokens}


def test_ratios_are_to_the_same_peer_and_one_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(variant: Variant, *_: object) -> FakeWorker:
        if variant.peer == "peft":
            raise PeerMissing("cannot be installed")
        return FakeWorker()

    monkeypatch.setattr(lora_tax, "start", start)
    monkeypatch.setattr(lora_tax, "wait_loaded", lambda worker: {})
    found = lora_tax.measure(tmp_path, "demo", "bfloat16", 1, [[1], [2]], (1, 2), repeats=2)
    rows = found["vllm"]
    assert rows["K=0"]["throughput_ratio"] == [1, 1, 1]
    assert rows["K=1"]["throughput_ratio"] == [0.8, 0.8, 0.8]
    assert rows["K=2"]["throughput_ratio"] == [0.5, 0.5, 0.5]
    assert rows["K=2"]["tokens_per_s"] == 2 * rows["output_tokens"] / 4
    assert [rows[f"K={k}"]["answers_changed"] for k in (0, 1, 2)] == [0, 2, 2]
    assert found["peft"] == {"missing": "cannot be installed"}
    table = report.table({"peer_tax": found})
    assert "vllm with K=1" in table
    assert "missing: peft with adapters: cannot be installed" in table

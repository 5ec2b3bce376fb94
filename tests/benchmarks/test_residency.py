from __future__ import annotations

from pathlib import Path

from benchmarks.residency import measure
from benchmarks.soak.world import save_tiny_model
from reft_core.loading import load_model


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Its own gates are inside: equal answers, and all cold where they should be."""
    save_tiny_model(tmp_path, seed=0)
    sizes = {"registered": 60, "requests": 3, "input_tokens": 20, "output_tokens": 4}
    found = measure(load_model(str(tmp_path)), **sizes, rank=2, repeats=2, loads=24, threads=1)
    assert set(found["cold_load_ms"]) == {"cached", "uncached", "busy"}
    for ratio in ("registered_ratio", "all_cold_ratio"):
        least, middle, most = found[ratio]
        assert 0 < least <= middle <= most
    assert set(found["resolve_us"]) == {10, 60}

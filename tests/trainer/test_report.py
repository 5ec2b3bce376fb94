from __future__ import annotations

from pathlib import Path

import pytest

from trainer.report import _shown, metric_rows, sparkline


def test_paths_are_told_from_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _shown(tmp_path / "out" / "a.safetensors") == "out/a.safetensors"
    assert _shown(Path("/elsewhere/a.safetensors")) == "/elsewhere/a.safetensors"


def test_a_metric_stands_beside_the_bases() -> None:
    rows = metric_rows(
        {
            "valid_loss": 1.0,
            "base_valid_loss": 9.0,
            "test_exact_match": 0.5,
            "test_base_exact_match": 0.25,
            "test_loss": 2.0,
        }
    )
    assert rows == [
        ("valid_loss", "9.0000", "1.0000"),
        ("test_exact_match", "0.2500", "0.5000"),
        ("test_loss", "", "2.0000"),
    ]


def test_a_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([8.0, 1.0, 4.5]) == "█▁▅"
    assert sparkline([2.0, 2.0]) == "▁▁"

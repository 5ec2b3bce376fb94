from __future__ import annotations

from pathlib import Path

import pytest

from trainer.evaluation.splits import Evaluation, Sample
from trainer.paths import shown_path
from trainer.report.document import _samples


def test_paths_are_told_from_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "out" / "a.safetensors") == "out/a.safetensors"
    assert shown_path(Path("/elsewhere/a.safetensors")) == "/elsewhere/a.safetensors"


def test_answers_are_judged_row_by_row_where_a_metric_can() -> None:
    samples = (Sample("a", "y", "I am", " y"), Sample("b", "n", "n", "y"))
    judged = _samples(Evaluation({}, None, samples), "exact_match")
    assert [(row["base_score"], row["adapter_score"]) for row in judged] == [(0, 1), (1, 0)]
    of_sets = _samples(Evaluation({}, None, samples), "pearson")
    assert {row["adapter_score"] for row in of_sets} == {None}

"""The figures that the examples' reports state come out of an evaluation too."""

from __future__ import annotations

import json

import pytest

from reft_core.adapter import Adapter
from reft_core.engine.engine import EmbeddedEngine
from reft_core.loading import LoadedModel
from tests.end_to_end.conftest import EXAMPLES
from trainer.evaluation.asking import EngineAsker
from trainer.evaluation.evaluate import Options, evaluate_model
from trainer.evaluation.local import contenders_of
from trainer.evaluation.rows import read_rows, with_labels

NAME = "sentiment"


@pytest.mark.smollm2
def test_both_accuracies_are_those_of_the_training_report(
    engine: EmbeddedEngine, served: LoadedModel, adapters: dict[str, Adapter]
) -> None:
    adapter = adapters[NAME]
    stated = json.loads((EXAMPLES / NAME / "report.json").read_text())["metrics"]
    rows = with_labels(read_rows(EXAMPLES / NAME), adapter.spec.task.labels or ())
    report = evaluate_model(
        EngineAsker(engine, served.tokenizer),
        rows,
        contenders_of(served, [None, adapter], "float32"),
        Options(metrics=("accuracy", "exact_match", "likelihood_accuracy", "loss")),
    )
    base, tuned = report.values["base"], report.values[NAME]
    # A row whose two labels are equally likely may fall either way between two summations.
    close = pytest.approx(stated["label_choice"], abs=1.01 / len(rows.rows))
    assert tuned["likelihood_accuracy"] == close
    assert tuned["exact_match"] == pytest.approx(stated["test_exact_match"], abs=0.001)
    assert tuned["accuracy"] >= tuned["exact_match"]
    assert tuned["loss"] == pytest.approx(stated["test_loss"], abs=1e-3)
    # When the report was written, the end token counted too, which the base does not expect.
    assert base["likelihood_accuracy"] > stated["base_label_choice"]
    assert base["exact_match"] == stated["test_base_exact_match"] == 0


@pytest.mark.smollm2
def test_the_reports_figure_of_the_base_counts_end_tokens(
    engine: EmbeddedEngine,
    served: LoadedModel,
    adapters: dict[str, Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As likelihoods did when it was written."""
    monkeypatch.setattr("trainer.evaluation.asking.engine.counted", list)
    stated = json.loads((EXAMPLES / NAME / "report.json").read_text())["metrics"]
    rows = with_labels(read_rows(EXAMPLES / NAME), adapters[NAME].spec.task.labels or ())
    report = evaluate_model(
        EngineAsker(engine, served.tokenizer),
        rows,
        contenders_of(served, [None], "float32"),
        Options(metrics=("likelihood_accuracy",)),
    )
    assert report.values["base"]["likelihood_accuracy"] == pytest.approx(
        stated["base_label_choice"], abs=1.01 / len(rows.rows)
    )

"""Metrics: pure functions of answered rows. Who answered them, and how, is not known here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.evaluation.scoring.base import (
    Answered,
    Metric,
    Need,
    RowMean,
    Statistic,
    TextCheck,
    value_of,
)
from trainer.evaluation.scoring.bootstrap import Estimate, Resampling
from trainer.evaluation.scoring.classes import F1, Matthews, accuracy
from trainer.evaluation.scoring.confusion import OTHER, Confusion, confusion
from trainer.evaluation.scoring.correlation import Correlation
from trainer.evaluation.scoring.losses import Loss
from trainer.evaluation.scoring.overlap import Bleu, Chrf, rouge
from trainer.evaluation.scoring.sql import ExecutionAccuracy
from trainer.evaluation.scoring.texts import emoji_only, exact_match, last_number, valid_json


def _right_number(row: Answered) -> float:
    """Whether the answer's last number is the right one."""
    right = (row.answer,) if row.answer else row.references
    return float(any(last_number(row.text, each) for each in right))


_CHECKS = (exact_match, valid_json, emoji_only)
_OF_BOTH: tuple[Metric, ...] = (
    accuracy("accuracy", "text"),
    accuracy("likelihood_accuracy", "choice"),
    F1("f1", "text", macro=False),
    F1("likelihood_f1", "choice", macro=False),
    F1("macro_f1", "text", macro=True),
    F1("likelihood_macro_f1", "choice", macro=True),
    Matthews("matthews", "text"),
    Matthews("likelihood_matthews", "choice"),
)
_OTHERS: tuple[Metric, ...] = (
    RowMean("last_number", _right_number),
    Correlation("pearson", ranked=False),
    Correlation("spearman", ranked=True),
    Bleu(),
    Chrf(),
    rouge("rouge1"),
    rouge("rouge2"),
    rouge("rougeL"),
    ExecutionAccuracy(),
    Loss("loss"),
    Loss("perplexity", exponential=True),
)
_ALL: tuple[Metric, ...] = (*map(TextCheck.of, _CHECKS), *_OF_BOTH, *_OTHERS)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
"""All that a config or a command may name."""

TEXT_METRICS: Mapping[str, Metric] = {
    name: metric
    for name, metric in METRICS.items()
    if metric.needs == "text" and not isinstance(metric, ExecutionAccuracy)
}
"""Those that need no more than a generated answer and its reference."""


def score(name: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """One of :data:`TEXT_METRICS` of plain answers, each with one reference."""
    assert answers, "no answers to score"
    return value_of(TEXT_METRICS[name], answered(answers, references))


def answered(answers: Sequence[str], references: Sequence[str]) -> list[Answered]:
    """Plain answers, each with one reference, as metrics look at them."""
    return [
        Answered((reference,), answer=reference, text=answer, predicted=answer)
        for answer, reference in zip(answers, references, strict=True)
    ]


__all__ = [
    "METRICS",
    "OTHER",
    "TEXT_METRICS",
    "Answered",
    "Confusion",
    "Estimate",
    "ExecutionAccuracy",
    "Metric",
    "Need",
    "Resampling",
    "RowMean",
    "Statistic",
    "TextCheck",
    "answered",
    "confusion",
    "score",
    "value_of",
]

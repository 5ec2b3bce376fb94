"""What rows are, and so which metrics, which way to read an answer and how long a one fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reft_core.errors import InvalidRequest
from trainer.evaluation.rows import Row
from trainer.evaluation.scoring import METRICS, Metric
from trainer.evaluation.scoring.correlation import number
from trainer.evaluation.scoring.extraction import EXTRACTORS, TRIGGER, Extractor

Kind = Literal[
    "labels", "scores", "commonsense", "letters", "choices", "numbers", "sql", "text", "read"
]

MANY_LABELS = 40
"""With more, likelihoods are measured only if a metric that needs them is named: they cost a short
request for each label of each row."""

_LETTERS = frozenset("ABCDE")
_CHOSEN = ("accuracy", "likelihood_accuracy")
_BOTH_F1 = ("macro_f1", "likelihood_macro_f1", "loss")
_OF_TWO = ("f1", "likelihood_f1", "matthews", "likelihood_matthews", "loss")


@dataclass(frozen=True)
class Task:
    """How one kind of rows is measured unless somebody says otherwise."""

    kind: Kind
    metrics: tuple[str, ...]
    extractor: str
    """Its name in :data:`EXTRACTORS`."""
    max_tokens: int
    """Of a greedy answer."""


def task_of(rows: Sequence[Row]) -> Task:
    """What ``rows`` are, by the columns they have; the first one that differs from the others
    makes them plain text.
    """
    kinds = {_kind_of(row) for row in rows}
    kind = kinds.pop() if len(kinds) == 1 else "text"
    longest = max(len(text) for row in rows for text in (*row.references, *row.candidates))
    several = any(len(row.references) > 1 for row in rows)
    labels = max(len(row.choices) for row in rows)
    # A token is about four characters of English, and seldom less than two.
    short = 8 + longest // 2
    named = _OF_TWO if labels == 2 else _BOTH_F1
    overlap = ("bleu", "chrf") if several else ("exact_match",)
    tasks: dict[Kind, tuple[tuple[str, ...], str, int]] = {
        "labels": ((*_CHOSEN, *named), "leading_choice", short),
        "scores": (("pearson", "spearman"), "last_number", short),
        # 32 and 512 tokens are the ReFT paper's.
        "commonsense": ((*_CHOSEN, "loss"), "after_trigger", 32),
        "letters": ((*_CHOSEN, "loss"), "first_letter", 512),
        "choices": ((*_CHOSEN, "loss"), "mentioned_choice", 32 + short),
        "numbers": (("last_number", "loss"), "last_number", 512),
        "sql": (("exact_match", "loss"), "sql", min(short, 512)),
        "text": ((*overlap, "rouge_l", "loss", "perplexity"), "whole", min(short, 512)),
        "read": (("loss", "perplexity"), "whole", 1),
    }
    metrics, extractor, max_tokens = tasks[kind]
    if labels > MANY_LABELS:
        metrics = tuple(name for name in metrics if METRICS[name].needs != "choice")
    return Task(kind, metrics, extractor, max_tokens)


def chosen_metrics(names: Sequence[str], rows: Sequence[Row]) -> tuple[Metric, ...]:
    """The metrics called so. Raises :class:`InvalidRequest` for one that is unknown, or that the
    rows have no right answers for.
    """
    for name in names:
        if name not in METRICS:
            raise InvalidRequest.because("metrics", name, f"some of {', '.join(METRICS)}")
        if METRICS[name].needs != "loss":
            _refuse(name, "question", [row for row in rows if not row.turns])
        if METRICS[name].needs == "choice":
            _refuse(name, "labels or choices", [row for row in rows if not row.candidates])
        if name in _NEED_ANSWERS:
            _refuse(name, "a label or an answer", [row for row in rows if not row.answer])
    return tuple(METRICS[name] for name in names)


def extractor_called(name: str) -> Extractor:
    """The way to read answers that is called so. Raises :class:`InvalidRequest`."""
    if name not in EXTRACTORS:
        raise InvalidRequest.because("extract", name, f"one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


_NEED_ANSWERS = (*_CHOSEN, *_OF_TWO[:-1], *_BOTH_F1[:-1], "pearson", "spearman")


def _refuse(name: str, needed: str, without: Sequence[Row]) -> None:
    if without:
        expected = f"metrics that need no {needed}, as {without[0].where} has none"
        raise InvalidRequest.because("metrics", name, expected)


def _kind_of(row: Row) -> Kind:
    if not row.turns:
        return "read"
    if row.is_number:
        return "scores"
    if row.choices and TRIGGER in row.references[0]:
        return "commonsense"
    if row.choices and set(row.choices) <= _LETTERS and row.references[0] != row.answer:
        return "letters"
    if row.choices:
        return "labels" if row.references[0].strip() == row.answer.strip() else "choices"
    if row.answer and number(row.answer) == number(row.answer):
        return "numbers"
    return "sql" if row.references[0].lstrip()[:7].upper() == "SELECT " else "text"

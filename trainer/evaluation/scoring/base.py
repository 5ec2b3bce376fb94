"""What a metric is: sums over answered rows, so that resampling the rows costs one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""(B, n): how often each of n rows is drawn in each of B samples; ones for the rows as they are."""
Values = NDArray[np.float64]
"""(B,): a metric of each sample."""
Statistic = Callable[[Counts], Values]
"""A metric of any samples of the rows it was made from."""

Need = Literal["text", "choice", "loss"]
"""What must be known of each row: a generated answer, the likeliest of its choices, or the loss of
its reference."""


@dataclass(frozen=True)
class Answered:
    """One row and how it was answered: all that a metric looks at."""

    references: tuple[str, ...]
    """Right answers in full, at least one."""
    answer: str = ""
    """The right short answer: a label, a choice, a number as text."""
    text: str = ""
    """The generated answer."""
    predicted: str = ""
    """The short answer found in ``text``; empty if there is none."""
    choice: str = ""
    """The likeliest of the row's choices."""
    loss: float = 0.0
    """Nats, summed over the tokens of the first reference."""
    num_tokens: int = 0
    """Of the first reference, its end token included."""


class Metric(Protocol):
    """One number about a set of answered rows."""

    @property
    def name(self) -> str:
        """By which a config or a command asks for it."""

    @property
    def needs(self) -> Need:
        """What it must know of a row."""

    @property
    def percent(self) -> bool:
        """Whether people read it times 100: all but losses and correlations."""

    def row_scores(self, rows: Sequence[Answered]) -> list[float] | None:
        """Each row's own score; None where only the set has one."""

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """The metric of any samples of ``rows``, at least one of them.

        ``labels`` are the classes in order, the last of two the positive one; classes that
        are not among them are found in the rows.
        """


@dataclass(frozen=True)
class RowMean:
    """The mean of a score that each row has by itself."""

    name: str
    score: Callable[[Answered], float]
    needs: Need = "text"
    percent: bool = True

    def row_scores(self, rows: Sequence[Answered]) -> list[float]:
        """Each row's score."""
        return [float(self.score(row)) for row in rows]

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """The mean over the rows of a sample."""
        return mean_of(self.row_scores(rows))


AnswerCheck = Callable[[str, str], bool]
"""Whether an answer is right, given a reference answer."""


@dataclass(frozen=True)
class TextCheck(RowMean):
    """The share of rows whose generated answer passes a check against any reference."""

    check: AnswerCheck = lambda answer, reference: answer == reference

    def __call__(self, answer: str, reference: str) -> bool:
        """Whether one answer passes."""
        return self.check(answer, reference)

    @classmethod
    def of(cls, check: AnswerCheck) -> TextCheck:
        """The metric that is called like the function ``check``."""
        name = check.__name__

        def score(row: Answered) -> float:
            return float(any(check(row.text, reference) for reference in row.references))

        return cls(name, score, check=check)


def mean_of(scores: Sequence[float]) -> Statistic:
    """The mean over the rows of a sample, given each row's score."""
    each = np.array(scores)  # (n,)
    return lambda counts: (counts @ each) / counts.sum(1)


def value_of(metric: Metric, rows: Sequence[Answered], labels: Sequence[str] = ()) -> float:
    """The metric of ``rows`` as they are."""
    whole = np.ones((1, len(rows)), dtype=np.int64)
    return float(metric.statistic(rows, labels)(whole)[0])

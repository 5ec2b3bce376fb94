"""Metrics of chosen labels: accuracy, F1, Matthews. From counts per class, so samples are sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.scoring.base import Answered, Counts, Need, RowMean, Statistic, Values

Matrix = NDArray[np.float64]


def accuracy(name: str, needs: Need) -> RowMean:
    """The share of rows whose label is right, as generated or as chosen."""
    return RowMean(name, lambda row: float(_said(row, needs) == row.answer.strip()), needs)


@dataclass(frozen=True)
class F1:
    """F1 = 2·TP / (2·TP + FP + FN): of the last of two labels, or the mean over all labels.

    ``macro`` averages over the labels that occur in a sample, right or answered, as
    scikit-learn does; an answer that is no label is a miss of the right one and no label's
    false positive.
    """

    name: str
    needs: Need
    macro: bool
    percent: bool = True

    def row_scores(self, rows: Sequence[Answered]) -> None:
        """A row has no F1."""
        return

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """F1 of any samples of the rows."""
        classes = _classes(rows, labels)
        if not self.macro:
            classes = classes[1:2]  # of more than two there is no positive one
        truth, said = _one_hot(rows, self.needs, classes)  # (n, C) each

        def values(counts: Counts) -> Values:
            hits = 2 * counts @ (truth * said)  # (B, C)
            total = counts @ truth + counts @ said  # 2·TP + FP + FN
            with np.errstate(invalid="ignore"):
                scores = hits / total
            present = total > 0
            of_sample = np.where(present, scores, 0).sum(1)
            found: Values = of_sample / np.maximum(present.sum(1), 1)
            return found

        return values


@dataclass(frozen=True)
class Matthews:
    """The Matthews correlation; for more than two labels, Gorodkin's R_K (2004).

    (c·s − Σ pₖtₖ) / √((s² − Σ pₖ²)(s² − Σ tₖ²)) with c right of s rows, label k answered pₖ and
    right tₖ times; 0 where a sample has one label only.
    """

    name: str
    needs: Need
    percent: bool = False

    def row_scores(self, rows: Sequence[Answered]) -> None:
        """A row has no correlation."""
        return

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """The correlation in any samples of the rows."""
        classes = _classes(rows, labels)
        truth, said = _one_hot(rows, self.needs, classes)  # (n, C) each
        right = (truth * said).sum(1)  # (n,)
        other = 1 - said.sum(1)  # answers that are no label are a class of their own

        def values(counts: Counts) -> Values:
            size = counts.sum(1).astype(float)
            t, p = counts @ truth, counts @ said  # (B, C)
            p_other = counts @ other
            covariance = (counts @ right) * size - (p * t).sum(1)
            spread_p = size**2 - (p**2).sum(1) - p_other**2
            spread_t = size**2 - (t**2).sum(1)
            scale = np.sqrt(spread_p * spread_t)
            found: Values = np.divide(
                covariance, scale, out=np.zeros_like(covariance), where=scale > 0
            )
            return found

        return values


def _said(row: Answered, needs: Need) -> str:
    """The label that a row was answered with."""
    return (row.choice if needs == "choice" else row.predicted).strip()


def _classes(rows: Sequence[Answered], labels: Sequence[str]) -> list[str]:
    """The labels in order, and behind them what else is right for a row."""
    known = dict.fromkeys(label.strip() for label in labels)
    return list(known | dict.fromkeys(sorted({row.answer.strip() for row in rows} - set(known))))


def _one_hot(
    rows: Sequence[Answered], needs: Need, classes: Sequence[str]
) -> tuple[Matrix, Matrix]:
    """Of each row the right label and the one answered, (n, C) each, zeros for any other."""
    places = {label: place for place, label in enumerate(classes)}
    truth, said = np.zeros((2, len(rows), len(classes)))
    for index, row in enumerate(rows):
        if (place := places.get(row.answer.strip())) is not None:
            truth[index, place] = 1
        if (place := places.get(_said(row, needs))) is not None:
            said[index, place] = 1
    return truth, said

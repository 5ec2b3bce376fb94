"""Correlation of the number that an answer holds with the right one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.scoring.base import Answered, Counts, Need, Statistic, Values
from trainer.evaluation.scoring.extraction import last_number

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation, or that of ranks (Spearman's); 0 where either does not vary.

    An answer without a number counts as the mean of those that have one, so it neither helps
    nor is left out.
    """

    name: str
    ranked: bool
    needs: Need = "text"
    percent: bool = False

    def row_scores(self, rows: Sequence[Answered]) -> None:
        """A row has no correlation."""
        return

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """The correlation in any samples of the rows."""
        wanted = np.array([number(row.answer) for row in rows])  # (n,)
        said = np.array([number(row.predicted) for row in rows])
        mean = said[np.isfinite(said)].mean() if np.isfinite(said).any() else 0.0
        said = np.where(np.isfinite(said), said, mean)
        measure = _spearman if self.ranked else _pearson

        def values(counts: Counts) -> Values:
            return np.array(
                [measure(np.repeat(said, drawn), np.repeat(wanted, drawn)) for drawn in counts]
            )

        return values


def number(text: str) -> float:
    """The last number in a text; NaN if there is none."""
    found = last_number(text)
    return float(found) if found else math.nan


def _pearson(said: Numbers, wanted: Numbers) -> float:
    from scipy.stats import pearsonr

    if np.ptp(said) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(pearsonr(said, wanted).statistic)


def _spearman(said: Numbers, wanted: Numbers) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(said), rankdata(wanted))

"""How likely the model finds the reference: loss per token, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.scoring.base import Answered, Counts, Need, Statistic, Values


@dataclass(frozen=True)
class Loss:
    """Nats per token of all references together, end tokens included, as training counts them.

    ``exponential`` makes it the perplexity.
    """

    name: str
    exponential: bool = False
    needs: Need = "loss"
    percent: bool = False

    def row_scores(self, rows: Sequence[Answered]) -> list[float]:
        """Each row's own mean over its tokens."""
        means = np.array([row.loss / max(row.num_tokens, 1) for row in rows])
        return [float(shown) for shown in self._shown(means)]

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """The loss of any samples of the rows."""
        losses = np.array([row.loss for row in rows])
        tokens = np.array([row.num_tokens for row in rows])

        def values(counts: Counts) -> Values:
            return self._shown((counts @ losses) / np.maximum(counts @ tokens, 1))

        return values

    def _shown(self, losses: Values) -> Values:
        with np.errstate(over="ignore"):
            return np.exp(losses) if self.exponential else losses

"""How sure a metric is: percentile intervals over rows drawn again and again (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.evaluation.scoring.base import Counts, Statistic, Values

NUM_SAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with the interval that holds it, at a level of :data:`LEVEL`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """The samples that all metrics of one set of rows are judged by.

    One set of samples for base and adapters, so that the difference of two is that of the same
    rows: a paired interval.
    """

    counts: Counts

    @classmethod
    def of(cls, num_rows: int, seed: int, num_samples: int = NUM_SAMPLES) -> Resampling:
        """``num_samples`` draws of ``num_rows`` rows with replacement; the same from one seed."""
        draw = np.random.default_rng(seed)
        return cls(draw.multinomial(num_rows, np.full(num_rows, 1 / num_rows), num_samples))

    def estimate(self, statistic: Statistic) -> Estimate:
        """A metric of all rows, and its interval."""
        return _estimate(statistic(self._whole)[0], statistic(self.counts))

    def difference(self, statistic: Statistic, base: Statistic) -> Estimate:
        """How much a metric is above the base's on the same rows, and its interval."""
        whole = statistic(self._whole)[0] - base(self._whole)[0]
        return _estimate(whole, statistic(self.counts) - base(self.counts))

    @property
    def _whole(self) -> Counts:
        return np.ones((1, self.counts.shape[1]), dtype=np.int64)


def _estimate(value: float, drawn: Values) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))

"""How much of the references' wording an answer has: BLEU, chrF, ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from trainer.evaluation.scoring.base import Answered, Counts, Need, RowMean, Statistic, Values


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU by sacrebleu's defaults (13a tokens, exponential smoothing), 0 to 1.

    All references of a row count. A sample's n-gram counts are the sums of its rows'.
    """

    name: str = "bleu"
    needs: Need = "text"
    percent: bool = True

    def row_scores(self, rows: Sequence[Answered]) -> list[float]:
        """BLEU of each answer alone, of the orders that it is long enough for."""
        metric = _bleu()
        return [metric.sentence_score(row.text, list(row.references)).score / 100 for row in rows]

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """BLEU of any samples of the rows."""
        metric = _bleu()
        sums = []
        for row in rows:
            one = metric.sentence_score(row.text, list(row.references))
            sums.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
        table = np.array(sums)  # (n, 2 + 2·4)

        def values(counts: Counts) -> Values:
            return np.array([_bleu_of(total) for total in (counts @ table).tolist()])

        return values


@dataclass(frozen=True)
class Chrf:
    """Corpus chrF2 by sacrebleu's defaults, 0 to 1; of each row's references, the closest."""

    name: str = "chrf"
    needs: Need = "text"
    percent: bool = True

    def row_scores(self, rows: Sequence[Answered]) -> list[float]:
        """chrF2 of each answer alone."""
        metric = _chrf()
        return [metric.sentence_score(row.text, list(row.references)).score / 100 for row in rows]

    def statistic(self, rows: Sequence[Answered], labels: Sequence[str] = ()) -> Statistic:
        """chrF2 of any samples of the rows."""
        metric = _chrf()
        # What sacrebleu's own resampling is made of; it has no public name for these two.
        table = np.array(
            [
                metric._extract_corpus_statistics([row.text], [[r] for r in row.references])[0]
                for row in rows
            ]
        )  # (n, k)

        def values(counts: Counts) -> Values:
            totals = (counts @ table).tolist()
            return np.array([metric._compute_score_from_stats(t).score / 100 for t in totals])

        return values


def rouge(kind: str) -> RowMean:
    """The mean F-measure of ROUGE-1, -2 or -L with stemming; of the references, the best."""

    def score(row: Answered) -> float:
        scorer = _rouge(kind)
        return float(scorer.score_multi(list(row.references), row.text)[kind].fmeasure)

    return RowMean(kind.lower().replace("rouge", "rouge_"), score)


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def _bleu_of(total: Sequence[int]) -> float:
    """BLEU of summed lengths, right n-grams and all n-grams of orders 1 to 4."""
    from sacrebleu.metrics import BLEU

    sys_len, ref_len, *grams = total
    found = BLEU.compute_bleu(grams[:4], grams[4:], sys_len, ref_len, smooth_method="exp")
    return float(found.score) / 100

"""Metrics of sets of rows equal what their definitions, or their libraries, say."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import pearsonr, spearmanr

from trainer.evaluation.scoring import METRICS, Answered, Resampling, value_of

LABELS = ("a", "b", "c")


def labelled(seed: int, labels: tuple[str, ...] = LABELS, count: int = 40) -> list[Answered]:
    """Rows whose answers are right about half the time, and no label at all now and then."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        right = draw.choice(labels)
        said = right if draw.random() < 0.5 else draw.choice((*labels, ""))
        rows.append(Answered((right,), answer=right, predicted=said, choice=draw.choice(labels)))
    return rows


def drawn(rows: list[Answered], seed: int = 3) -> tuple[list[Answered], np.ndarray]:
    """A sample of rows with replacement, written out, and as counts."""
    places = random.Random(seed).choices(range(len(rows)), k=len(rows))
    counts = Counter(places)
    return [rows[p] for p in sorted(places)], np.array([[counts[p] for p in range(len(rows))]])


def slow_f1(rows: list[Answered], label: str) -> float | None:
    right = sum(r.answer == label == r.predicted for r in rows)
    wrong = sum((r.answer == label) != (r.predicted == label) for r in rows)
    return 2 * right / (2 * right + wrong) if right + wrong else None


def slow_matthews(rows: list[Answered]) -> float:
    """Pearson's correlation of the labels' indicator variables, summed over labels."""
    names = sorted({r.answer for r in rows} | {r.predicted for r in rows})
    covariance = {"xy": 0.0, "xx": 0.0, "yy": 0.0}
    for name in names:
        x = [float(r.predicted == name) for r in rows]
        y = [float(r.answer == name) for r in rows]
        mx, my = sum(x) / len(x), sum(y) / len(y)
        covariance["xy"] += sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
        covariance["xx"] += sum((p - mx) ** 2 for p in x)
        covariance["yy"] += sum((q - my) ** 2 for q in y)
    return covariance["xy"] / math.sqrt(covariance["xx"] * covariance["yy"])


def test_macro_f1_is_the_mean_over_labels_that_occur() -> None:
    rows = labelled(1)
    scores = [score for label in LABELS if (score := slow_f1(rows, label)) is not None]
    found = value_of(METRICS["macro_f1"], rows, (*LABELS, "never"))
    assert found == pytest.approx(sum(scores) / len(scores))


def test_f1_of_two_labels_is_that_of_the_last() -> None:
    rows = labelled(2, ("no", "yes"))
    assert value_of(METRICS["f1"], rows, ("no", "yes")) == pytest.approx(slow_f1(rows, "yes"))
    assert value_of(METRICS["f1"], rows, ("yes", "no")) == pytest.approx(slow_f1(rows, "no"))


@pytest.mark.parametrize("labels", [("no", "yes"), LABELS])
def test_matthews_is_a_correlation_with_other_answers_as_a_class(labels: tuple[str, ...]) -> None:
    rows = labelled(3, labels)
    assert value_of(METRICS["matthews"], rows, labels) == pytest.approx(slow_matthews(rows))


def test_one_label_alone_has_no_correlation() -> None:
    rows = [Answered(("a",), answer="a", predicted="a")] * 3
    assert value_of(METRICS["matthews"], rows, LABELS) == 0


def test_a_choice_by_likelihood_is_scored_apart_from_the_generated_answer() -> None:
    rows = [
        Answered(("a",), answer="a", predicted="", choice="a"),
        Answered(("b",), answer="b", predicted="b", choice="a"),
        Answered(("b",), answer="b", predicted="", choice="b"),
    ]
    assert value_of(METRICS["accuracy"], rows) == pytest.approx(1 / 3)
    assert value_of(METRICS["likelihood_accuracy"], rows) == pytest.approx(2 / 3)


def test_correlations_are_scipys_and_an_answer_without_a_number_counts_as_the_mean() -> None:
    said = ["1.5", "about 4", "2", "5.0", "3"]
    wanted = ["1", "3.2", "2.5", "4.8", "0"]
    rows = [Answered((w,), answer=w, predicted=s) for s, w in zip(said, wanted, strict=True)]
    numbers = [1.5, 4, 2, 5, 3], [float(w) for w in wanted]
    assert value_of(METRICS["pearson"], rows) == pytest.approx(pearsonr(*numbers).statistic)
    assert value_of(METRICS["spearman"], rows) == pytest.approx(spearmanr(*numbers).statistic)
    silent = [*rows, Answered(("2",), answer="2", predicted="no idea")]
    mean = sum(numbers[0]) / 5
    expected = pearsonr([*numbers[0], mean], [*numbers[1], 2]).statistic
    assert value_of(METRICS["pearson"], silent) == pytest.approx(expected)
    assert value_of(METRICS["pearson"], [replace(r, predicted="") for r in rows]) == 0


TEXTS = (
    ("the cat sat on the mat", ("a cat sat on the mat", "the cat is on the mat")),
    ("there is a coffee shop by the river", ("a coffee shop stands by the river",)),
    ("", ("nothing was said here at all",)),
    ("it is a cheap pub in the city centre", ("a cheap pub in the city", "cheap pub, city centre")),
)
OVERLAP = [Answered(references, text=text) for text, references in TEXTS]


def streams(rows: list[Answered]) -> list[list[str | None]]:
    """References as sacrebleu takes them: all first ones, all second ones."""
    longest = max(len(row.references) for row in rows)
    return [
        [row.references[i] if i < len(row.references) else None for row in rows]
        for i in range(longest)
    ]


def test_bleu_and_chrf_are_sacrebleus_over_the_whole_corpus() -> None:
    for rows in (OVERLAP, drawn(OVERLAP)[0]):
        texts = [row.text for row in rows]
        bleu = BLEU().corpus_score(texts, streams(rows)).score / 100
        assert value_of(METRICS["bleu"], rows) == pytest.approx(bleu)
    # chrF takes as many references for each row.
    single = [replace(row, references=row.references[:1]) for row in OVERLAP]
    chrf = CHRF().corpus_score([r.text for r in single], streams(single)).score / 100
    assert value_of(METRICS["chrf"], single) == pytest.approx(chrf)


def test_rouge_takes_the_best_reference() -> None:
    row = Answered(("nothing alike", "the cat sat"), text="the cat sat")
    assert value_of(METRICS["rouge_l"], [row]) == 1
    half = Answered(("one two",), text="one three")
    assert value_of(METRICS["rouge_1"], [half]) == pytest.approx(0.5)


def test_the_loss_is_per_token_and_perplexity_its_exponential() -> None:
    rows = [Answered(("x",), loss=6.0, num_tokens=2), Answered(("y",), loss=1.0, num_tokens=5)]
    assert value_of(METRICS["loss"], rows) == pytest.approx(1.0)
    assert value_of(METRICS["perplexity"], rows) == pytest.approx(math.e)
    assert METRICS["loss"].row_scores(rows) == [3.0, 0.2]


def test_the_last_number_is_compared_with_the_short_answer() -> None:
    rows = [
        Answered(("so 3 + 4 = 7\n#### 7",), answer="7", text="3 and 4 make 7.0"),
        Answered(("#### 1,200",), answer="1,200", text="it is 1200"),
        Answered(("#### 5",), answer="5", text="none"),
        Answered(("#### -2",), answer="-2", text="2"),
    ]
    assert METRICS["last_number"].row_scores(rows) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "name", ["accuracy", "macro_f1", "matthews", "pearson", "spearman", "bleu", "chrf", "loss"]
)
def test_a_sample_by_counts_is_the_metric_of_the_sample_written_out(name: str) -> None:
    rows = {
        "bleu": list(OVERLAP),
        "chrf": list(OVERLAP),
        "loss": [Answered(("x",), loss=float(n * n), num_tokens=n + 1) for n in range(9)],
    }.get(name, labelled(5))
    if name in ("pearson", "spearman"):
        rows = [Answered((str(n),), answer=str(n), predicted=str(n * n % 7)) for n in range(12)]
    sample, counts = drawn(rows)
    by_counts = METRICS[name].statistic(rows, LABELS)(counts)
    assert by_counts.tolist() == pytest.approx([value_of(METRICS[name], sample, LABELS)])


def test_intervals_are_quantiles_of_the_seeds_samples() -> None:
    rows, others = labelled(6), labelled(7)
    accuracy = METRICS["accuracy"]
    resampling = Resampling.of(len(rows), seed=4, num_samples=200)
    found = resampling.estimate(accuracy.statistic(rows))
    scores = np.array(accuracy.row_scores(rows))
    slow = [scores[np.repeat(np.arange(len(rows)), c)].mean() for c in resampling.counts]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert found.low < found.value < found.high
    again = Resampling.of(len(rows), seed=4, num_samples=200)
    assert again.estimate(accuracy.statistic(rows)) == found
    assert Resampling.of(len(rows), seed=5).estimate(accuracy.statistic(rows)) != found
    same = resampling.difference(accuracy.statistic(rows), accuracy.statistic(rows))
    assert (same.value, same.low, same.high) == (0, 0, 0)  # paired: of the same rows
    gap = resampling.difference(accuracy.statistic(rows), accuracy.statistic(others))
    assert gap.value == pytest.approx(value_of(accuracy, rows) - value_of(accuracy, others))
    assert gap.high - gap.low > 0

"""One evaluation: the same rows for every contender, scored and compared.

::

    asker = EngineAsker(engine, tokenizer)
    rows = read_rows(Path("test.jsonl"))
    report = evaluate_model(asker, rows, [base, adapter])
    report.results[1].metrics["accuracy"].value
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reft_core.errors import InvalidRequest
from trainer.evaluation.asking.interface import Asker, Contender, Question, Reply, Wanted
from trainer.evaluation.asking.ledger import Ledger
from trainer.evaluation.rows import Row, RowSet
from trainer.evaluation.scoring import (
    Answered,
    Confusion,
    Estimate,
    ExecutionAccuracy,
    Metric,
    Resampling,
    Statistic,
    confusion,
)
from trainer.evaluation.scoring.extraction import Extractor
from trainer.evaluation.tasks import chosen_metrics, extractor_called, task_of
from trainer.progress import Progress, SilentProgress


@dataclass(frozen=True)
class Options:
    """What may be said of an evaluation. What is not, follows from its rows."""

    metrics: tuple[str, ...] = ()
    """Names in :data:`scoring.METRICS`."""
    extract: str | None = None
    """How to read an answer: a name in :data:`extraction.EXTRACTORS`."""
    max_tokens: int | None = None
    """Of a greedy answer."""
    database: Path | None = None
    """The SQLite file that queries run on."""
    seed: int = 0
    """Of the samples that intervals are from."""


@dataclass(frozen=True)
class Result:
    """How one contender did."""

    contender: Contender
    metrics: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    """What each metric is above the first contender's, on the same rows; empty for that one."""
    confusions: Mapping[str, Confusion]
    """For rows with the same labels: ``text`` by generated answers, ``choice`` by likelihood."""
    replies: tuple[Reply, ...]
    answered: tuple[Answered, ...]
    row_scores: Mapping[str, Sequence[float]]
    """Of the metrics that a row has by itself."""


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation, whole."""

    rows: RowSet
    metrics: tuple[Metric, ...]
    options: Options
    """With nothing left open."""
    results: tuple[Result, ...]
    """In the contenders' order."""

    @property
    def values(self) -> dict[str, dict[str, float]]:
        """Each contender's metrics by name, without intervals."""
        return {
            result.contender.name: {name: found.value for name, found in result.metrics.items()}
            for result in self.results
        }


def evaluate_model(
    asker: Asker,
    rows: RowSet,
    contenders: Sequence[Contender],
    options: Options = Options(),
    *,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Ask every contender every row, and score the answers.

    Whatever the contenders are, their questions go to ``asker`` together, so that they share its
    batch. Replies in ``ledger`` are not asked for again. Raises :class:`InvalidRequest` for
    options that do not fit the rows, and what asking raises.
    """
    if not rows.rows or not contenders:
        raise InvalidRequest.because("rows", len(rows.rows), "at least one row and one contender")
    options, metrics = settled(options, rows)
    questions = questions_of(rows.rows, contenders, metrics, options)
    replies = _ask(asker, questions, ledger or Ledger(None), progress or SilentProgress())
    count = len(contenders)
    results: list[Result] = []
    first: dict[str, Statistic] = {}
    resampling = Resampling.of(len(rows.rows), options.seed)
    for place, contender in enumerate(contenders):
        result, statistics = _result(
            contender, rows, replies[place::count], metrics, options, resampling, first
        )
        first = first or statistics
        results.append(result)
    return EvaluationReport(rows, metrics, options, tuple(results))


def questions_of(
    rows: Sequence[Row],
    contenders: Sequence[Contender],
    metrics: Sequence[Metric],
    options: Options,
) -> list[Question]:
    """Every row for every contender, a row's together; ``options`` settled."""
    needs = {metric.needs for metric in metrics}
    assert options.max_tokens is not None
    wanted = Wanted("text" in needs, "choice" in needs, "loss" in needs, options.max_tokens)
    return [Question(contender, row, wanted) for row in rows for contender in contenders]


def settled(options: Options, rows: RowSet) -> tuple[Options, tuple[Metric, ...]]:
    """``options`` with nothing left open, and the metrics that they name.

    Raises :class:`InvalidRequest` for options that do not fit the rows.
    """
    options = _closed(options, rows.rows)
    metrics = chosen_metrics(options.metrics, rows.rows)
    runs = [metric for metric in metrics if isinstance(metric, ExecutionAccuracy)]
    if runs and not (options.database and options.database.is_file()):
        found = options.database and str(options.database)
        raise InvalidRequest.because("database", found, "a SQLite file, for execution_accuracy")
    return options, tuple(
        replace(metric, database=options.database) if metric in runs else metric
        for metric in metrics
    )


def _closed(options: Options, rows: Sequence[Row]) -> Options:
    task = task_of(rows)
    metrics = options.metrics or task.metrics
    if not options.metrics and task.kind == "sql" and options.database:
        metrics = ("execution_accuracy", *metrics)
    return replace(
        options,
        metrics=metrics,
        extract=options.extract or task.extractor,
        max_tokens=options.max_tokens or task.max_tokens,
    )


def _ask(
    asker: Asker, questions: Sequence[Question], ledger: Ledger, progress: Progress
) -> list[Reply]:
    """The replies, in the questions' order."""
    replies: dict[int, Reply] = {}
    with progress.stage("answers", len(questions)) as advance:
        for place, reply in ledger.ask(asker, questions):
            replies[place] = reply
            advance("")
    return [replies[place] for place in range(len(questions))]


def _result(
    contender: Contender,
    rows: RowSet,
    replies: Sequence[Reply],
    metrics: Sequence[Metric],
    options: Options,
    resampling: Resampling,
    first: Mapping[str, Statistic],
) -> tuple[Result, dict[str, Statistic]]:
    """One contender's scores, and the statistics that others are compared with."""
    assert options.extract is not None
    extractor = extractor_called(options.extract)
    answered = [
        _answered(row, reply, extractor) for row, reply in zip(rows.rows, replies, strict=True)
    ]
    statistics = {metric.name: metric.statistic(answered, rows.labels) for metric in metrics}
    scores = {metric.name: metric.row_scores(answered) for metric in metrics}
    result = Result(
        contender=contender,
        metrics={name: resampling.estimate(each) for name, each in statistics.items()},
        differences={
            name: resampling.difference(statistics[name], base) for name, base in first.items()
        },
        confusions=_confusions(rows, answered, {metric.needs for metric in metrics}),
        replies=tuple(replies),
        answered=tuple(answered),
        row_scores={name: each for name, each in scores.items() if each is not None},
    )
    return result, statistics


def _answered(row: Row, reply: Reply, extractor: Extractor) -> Answered:
    """What metrics see of a row and its reply."""
    choice = ""
    if reply.logprobs:
        choice = row.choices[reply.logprobs.index(max(reply.logprobs))]
    return Answered(
        references=row.references,
        answer=row.answer,
        text=reply.text,
        predicted=extractor(reply.text, row.choices),
        choice=choice,
        loss=reply.loss,
        num_tokens=reply.num_tokens,
    )


def _confusions(
    rows: RowSet, answered: Sequence[Answered], needs: set[str]
) -> dict[str, Confusion]:
    """The matrices of rows that choose among one set of labels."""
    if not rows.labels or any(row.choices != rows.rows[0].choices for row in rows.rows):
        return {}
    right = [row.answer for row in answered]
    said = {
        "text": [row.predicted for row in answered],
        "choice": [row.choice for row in answered],
    }
    return {by: confusion(rows.labels, said[by], right) for by in said if by in needs}

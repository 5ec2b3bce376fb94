"""A comparison as rows of a table: means over seeds, with intervals over seeds and test rows.

An interval is a two-level percentile bootstrap: each of its samples draws test rows with
replacement, the same for every method, and seeds with replacement, and takes the mean over the
drawn seeds of the metric on the drawn rows. With one seed it covers the rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from trainer.compare.answers import Answers
from trainer.compare.contenders import CONTENDERS, Setting
from trainer.compare.run import Comparison
from trainer.compare.store import Record, as_text
from trainer.evaluation.scoring import Estimate, Resampling, Statistic
from trainer.evaluation.scoring.base import Counts, Values

Spread = dict[str, float]
"""``median``, ``low`` and ``high``: the quartiles; empty if there are none."""


@dataclass(frozen=True)
class Row:
    """One method. Numbers of training are means over seeds."""

    method: str
    label: str
    setting: str
    num_tried: int
    """Settings that its search tried; 1 where there was no choice."""
    num_seeds: int
    """Of the tested runs that did not fail."""
    error: str = ""
    """The message of its first failed run; with no other run there is no number."""
    quality: Estimate | None = None
    """The metric as it is, not in percent."""
    by_seed: tuple[float, ...] = ()
    difference: Estimate | None = None
    """From the reference method, on the same rows."""
    num_parameters: int = 0
    percent_of_base: float = 0.0
    training_seconds: float = 0.0
    """By the clock on the wall."""
    training_cpu_seconds: float = 0.0
    file_bytes: int = 0
    serving_scope: str = ""
    serving_extra_percent: float = 0.0
    first_token: Spread = field(default_factory=dict)
    """Time to a request's first token over the base's, if it was measured."""
    speed: Spread = field(default_factory=dict)
    """Tokens a second after that over the base's."""


def table_rows(comparison: Comparison) -> list[Row]:
    """A row for each method that has a place on the base, in the order of the comparison."""
    resampling = Resampling.of(len(comparison.references), seed=0)
    done = {
        name: [record for record in records if record["status"] == "done"]
        for name, records in comparison.finals.items()
    }
    statistics = {
        name: over_seeds([_statistic(comparison, record) for record in records])
        for name, records in done.items()
        if records
    }
    reference = statistics.get(comparison.config.reference or "")
    rows = []
    for name in comparison.chosen:
        if name not in statistics:
            error = _first_error(comparison, name)
            label, num_tried = CONTENDERS[name].label, comparison.tried[name]
            rows.append(Row(name, label, "", num_tried, num_seeds=0, error=error))
            continue
        records, statistic = done[name], statistics[name]
        is_other = reference is not None and name != comparison.config.reference
        rows.append(
            Row(
                method=name,
                label=CONTENDERS[name].label,
                setting=setting_text(records[0]["setting"]),
                num_tried=comparison.tried[name],
                num_seeds=len(records),
                error=_first_error(comparison, name),
                quality=resampling.estimate(statistic),
                by_seed=tuple(r["test"][comparison.metric.name] for r in records),
                difference=resampling.difference(statistic, reference)
                if is_other and reference
                else None,
                num_parameters=records[0]["num_trainable"],
                percent_of_base=100 * records[0]["num_trainable"] / comparison.num_base_parameters,
                training_seconds=fmean(r["training_seconds"] for r in records),
                training_cpu_seconds=fmean(r["training_cpu_seconds"] for r in records),
                file_bytes=records[0]["file_bytes"],
                serving_scope=records[0]["serving"]["scope"],
                serving_extra_percent=fmean(r["serving"]["extra_percent"] for r in records),
                **comparison.latency.get("ratios", {}).get(name, {}),
            )
        )
    return rows


def over_seeds(statistics: Sequence[Statistic]) -> Statistic:
    """The mean over seeds, themselves drawn with replacement where the rows are."""

    def values(counts: Counts) -> Values:
        each = np.stack([statistic(counts) for statistic in statistics])  # (S, B)
        if len(counts) > 1:  # not the rows as they are
            drawn = np.random.default_rng(0).integers(len(each), size=each.shape)
            each = np.take_along_axis(each, drawn, axis=0)
        mean: Values = each.mean(axis=0)
        return mean

    return values


def _statistic(comparison: Comparison, record: Record) -> Statistic:
    rows = Answers.from_json(record["answers"]).against(comparison.references)
    return comparison.metric.statistic(rows, comparison.labels)


def setting_text(setting: Setting) -> str:
    """``lr 0.0017, r 4``: a method's setting in few words."""
    short = {"learning_rate": "lr", "prefix_length": "n", "rank": "r", "shots": "k"}
    return ", ".join(
        f"{short.get(name, name)} {f'{value:g}' if isinstance(value, float) else as_text(value)}"
        for name, value in setting.items()
    )


def _first_error(comparison: Comparison, name: str) -> str:
    failed = [r["error"] for r in comparison.finals.get(name, ()) if r["status"] == "failed"]
    if comparison.chosen[name] is None:
        return "every setting of its search failed"
    return failed[0] if failed else ""

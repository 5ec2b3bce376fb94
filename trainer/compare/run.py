"""One comparison: search on validation, then train with every seed and test once.

No test row is looked at before every method's setting is chosen; :func:`compare` loads them then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import Contender, Setting, get_contenders
from trainer.compare.jobs import search_jobs, search_settings, tested_seeds
from trainer.compare.runner import Runner
from trainer.compare.settings import check_settings, training_config
from trainer.compare.store import Job, Record, Store
from trainer.compare.task import Task, check_has_test, load_task, load_test
from trainer.config import TrainConfig
from trainer.evaluation.scoring import METRICS, Metric
from trainer.progress import Progress, SilentProgress


@dataclass(frozen=True)
class Comparison:
    """What a comparison found: a record for each method and seed, and what it was about."""

    config: CompareConfig
    task: dict[str, Any]
    metric: Metric
    references: list[str]
    labels: tuple[str, ...]
    num_base_parameters: int
    chosen: dict[str, Setting | None]
    """By method; None where every setting of the search failed."""
    finals: dict[str, list[Record]]
    """By method, its tested runs in the order of the seeds."""


def compare(
    config: TrainConfig,
    comparison: CompareConfig,
    *,
    loaded: LoadedModel | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Run what is missing of a comparison and return all of it.

    Raises :class:`TrainingError` before anything is trained when the data or a method's settings
    cannot be used. A single run that fails is recorded as failed and the others go on.
    """
    check_has_test(config)
    contenders = get_contenders(comparison.methods)
    spare = max((max(c.sizes) for c in contenders if c.size == "prefix_length"), default=0)
    task = load_task(
        config,
        loaded=loaded,
        train_rows=comparison.train_rows,
        valid_rows=comparison.valid_rows,
        steps=comparison.steps,
        spare_tokens=spare,
    )
    metric = _metric(task.config, contenders)
    check_settings(comparison)
    for contender in contenders:  # whatever is wrong with a setting is said now
        for setting in search_settings(contender, comparison):
            training_config(task, contender, setting, comparison.seeds[0], comparison)
    facts = _facts(task, comparison, metric)
    runner = Runner(
        task,
        comparison,
        metric,
        Store(comparison.out, facts),
        command,
        progress or SilentProgress(),
    )
    runner.do(search_jobs(contenders, comparison))
    chosen = {contender.name: runner.best(contender) for contender in contenders}
    test = load_test(task, test_rows=comparison.test_rows, spare_tokens=spare)
    runner.store.agree("test.json", {"test_sha256": test.dataset.sha256})
    finals = {
        name: [Job.of("final", name, setting, seed) for seed in tested_seeds(name, comparison)]
        for name, setting in chosen.items()
        if setting is not None
    }
    runner.do([job for jobs in finals.values() for job in jobs], test)
    return Comparison(
        config=comparison,
        task=facts,
        metric=metric,
        references=test.references,
        labels=task.config.labels or (),
        num_base_parameters=task.loaded.description.num_parameters,
        chosen=chosen,
        finals={name: [runner.read(job) for job in jobs] for name, jobs in finals.items()},
    )


def _metric(config: TrainConfig, contenders: Sequence[Contender]) -> Metric:
    """What the comparison is about: choosing among labels, or the config's first metric."""
    if config.labels:
        return METRICS["likelihood_accuracy"]
    if heads := [c.name for c in contenders if c.kind == "head"]:
        raise TrainingError(explain("methods", heads[0], "labels in the config: it has no text"))
    return METRICS[config.metrics[0]]


def _facts(task: Task, comparison: CompareConfig, metric: Metric) -> dict[str, Any]:
    """All that every result depends on, as JSON values."""
    ours = {"name", "description", "licence", "output", "report_dir", "train", "valid", "test"}
    return {
        "config": task.config.model_dump(mode="json", exclude=ours),
        "train_sha256": task.train.dataset.sha256,
        "train_rows": len(task.train.rows),
        "valid_sha256": task.valid.dataset.sha256,
        "valid_rows": len(task.valid.rows),
        "test_rows": comparison.test_rows,
        "settings": comparison.settings,
        "metric": metric.name,
        "model": task.loaded.description.name,
    }

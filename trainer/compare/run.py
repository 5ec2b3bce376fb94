"""One comparison: search on validation, then train with every seed and test once.

No test row is looked at before every method's setting is chosen; :func:`compare` loads them then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from reft_core.adapter import decode_adapter
from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel, ModelKind
from trainer.compare.answers import References
from trainer.compare.arena import arena_for
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import Setting, get_contenders
from trainer.compare.jobs import search_jobs, search_settings, tested_seeds
from trainer.compare.latency import measure
from trainer.compare.runner import Runner
from trainer.compare.settings import check_settings, longest_prefix, training_config
from trainer.compare.store import Job, Record, Store
from trainer.compare.task import Split, check_has_test, load_task, load_test
from trainer.config import TrainConfig
from trainer.evaluation.scoring import Metric
from trainer.progress import Progress, SilentProgress

logger = logging.getLogger(__name__)

Clock = Literal["CPU", "wall"]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found: a record for each method and seed, and what it was about."""

    config: CompareConfig
    task: dict[str, Any]
    kind: ModelKind
    metric: Metric
    references: list[References]
    labels: tuple[str, ...]
    num_base_parameters: int
    clock: Clock
    """Of the training seconds that are shown: the CPU's, where it computes; neither a pause nor
    what else the machine does adds to those."""
    left_out: dict[str, str]
    """By method that has no place on the base, why."""
    chosen: dict[str, Setting | None]
    """By method; None where every setting of the search failed."""
    tried: dict[str, int]
    """By method, how many settings its search tried; 1 where there was no choice."""
    finals: dict[str, list[Record]]
    """By method, its tested runs in the order of the seeds."""
    latency: Record = field(default_factory=dict)
    """Times of requests with each method's adapter over the base's, if they were measured."""


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
    check_settings(comparison)
    contenders = get_contenders(comparison.methods)
    spare = longest_prefix(contenders, comparison)
    task = load_task(
        config,
        loaded=loaded,
        train_rows=comparison.train_rows,
        valid_rows=comparison.valid_rows,
        steps=comparison.steps,
        spare_tokens=spare,
    )
    arena = arena_for(task, comparison.metric)
    if comparison.measure_serving and task.kind != "causal":
        allowed = "0: requests are timed on a causal model's engine alone"
        raise TrainingError(explain("measure_serving", comparison.measure_serving, allowed))
    contenders, left_out = arena.sort(contender.on(task.kind) for contender in contenders)
    if not contenders:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise TrainingError(f"methods: none has a place on this base; {reasons}", field="methods")
    searches = {c: search_settings(task, c, comparison) for c in contenders}
    for contender, settings in searches.items():  # whatever is wrong with one is said now
        for setting in settings:
            training_config(arena, contender, setting, comparison.seeds[0], comparison)
    facts = task.facts | {
        "test_rows": comparison.test_rows,
        "settings": comparison.settings,
        "metric": arena.metric.name,
        "model": task.loaded.description.name,
    }
    store = Store(comparison.out, facts)
    runner = Runner(arena, comparison, store, command, progress or SilentProgress())
    runner.do(search_jobs(task, contenders, comparison), runner.run)
    chosen = {contender.name: runner.best(contender) for contender in contenders}
    test = load_test(task, test_rows=comparison.test_rows, spare_tokens=spare)
    store.agree("test.json", {"test_sha256": test.dataset.sha256})
    finals = {
        name: [Job.of("final", name, setting, seed) for seed in tested_seeds(name, comparison)]
        for name, setting in chosen.items()
        if setting is not None
    }
    runner.do([job for jobs in finals.values() for job in jobs], partial(runner.run, test=test))
    return Comparison(
        config=comparison,
        task=facts,
        kind=task.kind,
        metric=arena.metric,
        references=arena.references(test),
        labels=arena.labels,
        clock="CPU" if task.loaded.model.device.type == "cpu" else "wall",
        num_base_parameters=task.loaded.description.num_parameters,
        left_out=left_out,
        chosen=chosen,
        tried={contender.name: len(settings) for contender, settings in searches.items()},
        finals={name: [runner.read(job) for job in jobs] for name, jobs in finals.items()},
        latency=_latency(runner, finals, test) if comparison.measure_serving else {},
    )


def _latency(runner: Runner, finals: Mapping[str, Sequence[Job]], test: Split) -> Record:
    """What :func:`trainer.compare.latency.measure` finds of each method's first adapter."""
    paths = {name: runner.store.adapter_path(jobs[0]) for name, jobs in finals.items()}
    adapters = {n: decode_adapter(path.read_bytes()) for n, path in paths.items() if path.exists()}
    if not adapters:
        return {}
    count = runner.comparison.measure_serving
    about = {"requests": count} | {name: a.digest[:12] for name, a in adapters.items()}
    job = Job.of("serving", "all", about, runner.comparison.seeds[0])
    loaded = runner.arena.task.loaded
    runner.do([job], lambda _: measure(loaded, adapters, test.rows, count))
    record = runner.read(job)
    if record["status"] == "failed":
        logger.warning("requests could not be timed: %s", record["error"])
        return {}
    return record

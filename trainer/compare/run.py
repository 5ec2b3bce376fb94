"""One comparison: search on validation, then train with every seed and test once.

No test row is looked at before every method's setting is chosen; :func:`compare` loads them then.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import torch
from safetensors import SafetensorError

from reft_core.errors import ReftError, TrainingError, explain
from reft_core.loading import LoadedModel
from trainer.collate import Collator
from trainer.compare import serving
from trainer.compare.answering import Answers, answer_by_engine, answer_by_model
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import CONTENDERS, Contender, Setting, get_contenders
from trainer.compare.learners import open_learner
from trainer.compare.prompting import with_shots
from trainer.compare.settings import check_settings, training_config
from trainer.compare.store import Job, Record, Store
from trainer.compare.task import Split, Task, load_task, load_test
from trainer.config import TrainConfig
from trainer.evaluation.scoring import METRICS, Metric, value_of
from trainer.export import TOOL
from trainer.fit import fit
from trainer.progress import Progress, SilentProgress

_POLL_S = 2.0
"""Between looks at what other processes are still doing."""


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
    if config.test is None:
        raise TrainingError("test: missing; a comparison ends on rows nothing was chosen by")
    contenders = get_contenders(comparison.methods)
    metric = _metric(config, contenders)
    spare = max((max(c.sizes) for c in contenders if c.size == "prefix_length"), default=0)
    task = load_task(
        config,
        loaded=loaded,
        train_rows=comparison.train_rows,
        valid_rows=comparison.valid_rows,
        steps=comparison.steps,
        spare_tokens=spare,
    )
    check_settings(comparison)
    for contender in contenders:  # whatever is wrong with a setting is said now
        for setting in search_settings(contender, comparison):
            training_config(task, contender, setting, comparison.seeds[0], comparison)
    facts = _facts(task, comparison, metric)
    runner = _Runner(
        task,
        comparison,
        metric,
        Store(comparison.out, facts),
        command,
        progress or SilentProgress(),
    )
    runner.do(_search_jobs(contenders, comparison))
    chosen = {contender.name: runner.best(contender) for contender in contenders}
    test = load_test(task, test_rows=comparison.test_rows, spare_tokens=spare)
    finals = {
        name: [Job.of("final", name, setting, seed) for seed in _seeds(name, comparison)]
        for name, setting in chosen.items()
        if setting is not None
    }
    runner.do([job for jobs in finals.values() for job in jobs], test)
    return Comparison(
        config=comparison,
        task=facts,
        metric=metric,
        references=test.references,
        labels=config.labels or (),
        num_base_parameters=task.loaded.description.num_parameters,
        chosen=chosen,
        finals={name: [runner.read(job) for job in jobs] for name, jobs in finals.items()},
    )


def search_settings(contender: Contender, comparison: CompareConfig) -> list[Setting]:
    """What a search tries of a method, without what the config has settled."""
    settled = comparison.settings.get(contender.name, {})
    found: list[Setting] = []
    for setting in contender.settings(comparison.search):
        left = {name: value for name, value in setting.items() if name not in settled}
        if left not in found:
            found.append(left)
    return found


def _metric(config: TrainConfig, contenders: Sequence[Contender]) -> Metric:
    """What the comparison is about: choosing among labels, or the config's first metric."""
    if config.labels:
        return METRICS["likelihood_accuracy"]
    if heads := [c.name for c in contenders if c.kind == "head"]:
        raise TrainingError(explain("methods", heads[0], "labels in the config: it has no text"))
    return METRICS[config.metrics[0]]


def _search_jobs(contenders: Iterable[Contender], comparison: CompareConfig) -> list[Job]:
    return [
        Job.of("search", contender.name, setting, comparison.seeds[0])
        for contender in contenders
        for setting in settings_to_try(contender, comparison)
    ]


def settings_to_try(contender: Contender, comparison: CompareConfig) -> list[Setting]:
    """Those of a search; none where there is no choice."""
    settings = search_settings(contender, comparison)
    return settings if len(settings) > 1 else []


def _seeds(name: str, comparison: CompareConfig) -> tuple[int, ...]:
    """Zero-shot draws nothing, so that one seed is all of them."""
    return comparison.seeds[:1] if name == "zero_shot" else comparison.seeds


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


@dataclass(frozen=True)
class _Runner:
    """Does jobs, each once."""

    task: Task
    comparison: CompareConfig
    metric: Metric
    store: Store
    command: str
    progress: Progress

    def do(self, jobs: Sequence[Job], test: Split | None = None) -> None:
        """Return once every job has a result, by this process or another."""
        while waiting := [job for job in jobs if self.store.read(job) is None]:
            busy = True
            for job in waiting:
                with self.store.claim(job) as mine:
                    if mine:
                        busy = False
                        self.store.write(job, self._record(job, test))
            if busy:
                time.sleep(_POLL_S)

    def read(self, job: Job) -> Record:
        """The result of a job that is done."""
        record = self.store.read(job)
        assert record is not None
        return record

    def best(self, contender: Contender) -> Setting | None:
        """The setting of the highest validation metric, then of the lowest validation loss."""
        jobs = _search_jobs([contender], self.comparison)
        if not jobs:
            return search_settings(contender, self.comparison)[0]
        found = [record for record in map(self.read, jobs) if record["status"] == "done"]
        best = max(found, key=_quality, default=None)
        return None if best is None else best["setting"]

    def _record(self, job: Job, test: Split | None) -> Record:
        with self.progress.stage(f"{job.phase} {job.method} {job.name}"):
            start = time.perf_counter()
            try:
                found = {"status": "done", **self._measure(job, test)}
            except (ReftError, SafetensorError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                found = {"status": "failed", "error": str(error)}
        return found | {
            "seconds": round(time.perf_counter() - start, 2),
            "provenance": {
                "tool": TOOL,
                "command": self.command,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": f"{platform.processor() or platform.machine()}, "
                f"{torch.get_num_threads()} threads",
            },
        }

    def _measure(self, job: Job, test: Split | None) -> Record:
        contender = CONTENDERS[job.method]
        if contender.kind == "prompting":
            return self._prompted(job, test)
        config = training_config(self.task, contender, dict(job.setting), job.seed, self.comparison)
        return self._trained(contender, config, test)

    def _prompted(self, job: Job, test: Split | None) -> Record:
        """The base with nothing, or with examples, before the question."""
        shots = int(dict(job.setting).get("shots", 0))
        split = self.task.valid if test is None else test
        asked = with_shots(self.task, split, shots, job.seed)
        record: Record = {"num_trainable": 0, "file_bytes": 0, "training_seconds": 0.0}
        if test is None:
            losses = answer_by_engine(self.task, asked, METRICS["loss"]).losses
            loss = math.fsum(x for x, _ in losses) / sum(count for _, count in losses)
            if self.metric.needs != "choice":
                return record | {"valid": {"loss": loss}}
            answers = answer_by_engine(self.task, asked, self.metric)
            return record | {"valid": {"loss": loss, self.metric.name: self._value(answers, asked)}}
        work = serving.Workload.of(self.task.loaded.description, test.rows)
        cost = serving.none()
        if shots:
            longer = serving.Workload.of(self.task.loaded.description, asked.rows)
            cost = serving.longer_prompt(work, longer.prompt - work.prompt)
        answers = answer_by_engine(self.task, asked, self.metric)
        return record | {"serving": asdict(cost)} | self._test(answers, test)

    def _trained(self, contender: Contender, config: TrainConfig, test: Split | None) -> Record:
        task = self.task
        with open_learner(contender, config, task) as learner:
            model = learner.model
            collator = Collator(config.rule)
            result = fit(
                model, task.train.rows, task.valid.rows, config, collator, SilentProgress()
            )
            saved = learner.save(result)
            record: Record = {
                "num_trainable": sum(p.numel() for p in model.trainable()),
                "file_bytes": saved.num_bytes,
                "training_seconds": round(result.seconds, 2),
                "num_steps": result.num_steps,
                "best_epoch": result.best.number,
                "valid_losses": [epoch.valid_loss for epoch in result.epochs],
            }
            if test is None:
                return record | self._validation(model, result.best.valid_loss)
            by_engine = self.metric.needs == "text" and saved.adapter is not None
            if not by_engine:
                answers = answer_by_model(task, test, self.metric, model)
        if by_engine:  # on the base as it was
            answers = answer_by_engine(task, test, self.metric, saved.adapter)
        work = serving.Workload.of(task.loaded.description, test.rows)
        if saved.adapter is not None:
            cost = serving.of_adapter(work, saved.adapter)
        elif contender.kind == "head":
            cost = serving.head(work, record["num_trainable"])
        else:
            cost = serving.own_weights()
        return record | {"serving": asdict(cost)} | self._test(answers, test)

    def _validation(self, model: Any, loss: float) -> Record:
        """What a setting is chosen by: labels if there are any, else the loss alone."""
        if self.metric.needs != "choice":
            return {"valid": {"loss": loss}}
        answers = answer_by_model(self.task, self.task.valid, self.metric, model)
        return {"valid": {"loss": loss, self.metric.name: self._value(answers, self.task.valid)}}

    def _test(self, answers: Answers, test: Split) -> Record:
        value = self._value(answers, test)
        return {"test": {self.metric.name: value}, "answers": answers.to_json()}

    def _value(self, answers: Answers, split: Split) -> float:
        rows = answers.against(split.references)
        return value_of(self.metric, rows, self.task.config.labels or ())


def _quality(record: Record) -> tuple[float, float]:
    """Higher is better."""
    scores = cast(dict[str, float], record["valid"])
    others = [value for name, value in scores.items() if name != "loss"]
    return (others[0] if others else 0.0, -scores["loss"])

"""Does the runs of a comparison, each once: trains, asks, and keeps what came of it."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import torch
from safetensors import SafetensorError

from reft_core.errors import ReftError
from reft_core.positions import PositionRule
from trainer.collate import Collator
from trainer.compare import serving
from trainer.compare.answering import Answers, answer_by_engine, answer_by_model
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import CONTENDERS, Contender, Setting
from trainer.compare.jobs import search_jobs, search_settings
from trainer.compare.learners import open_learner
from trainer.compare.prompting import with_shots
from trainer.compare.settings import training_config
from trainer.compare.store import Job, Record, Store
from trainer.compare.task import Split, Task
from trainer.config import TrainConfig
from trainer.evaluation.scoring import METRICS, Metric, value_of
from trainer.export import TOOL
from trainer.fit import fit
from trainer.progress import Progress, SilentProgress

_POLL_S = 2.0
"""Between looks at what other processes are still doing."""


@dataclass(frozen=True)
class Runner:
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
        jobs = search_jobs([contender], self.comparison)
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
                "training_cpu_seconds": round(result.cpu_seconds, 2),
                "num_steps": result.num_steps,
                "best_epoch": result.best.number,
                "valid_losses": [epoch.valid_loss for epoch in result.epochs],
            }
            if test is None:
                return record | self._validation(model, config.rule, result.best.valid_loss)
            by_engine = self.metric.needs == "text" and saved.adapter is not None
            if not by_engine:
                answers = answer_by_model(task, test, self.metric, model, config.rule)
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

    def _validation(self, model: Any, rule: PositionRule, loss: float) -> Record:
        """What a setting is chosen by: labels if there are any, else the loss alone."""
        if self.metric.needs != "choice":
            return {"valid": {"loss": loss}}
        answers = answer_by_model(self.task, self.task.valid, self.metric, model, rule)
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

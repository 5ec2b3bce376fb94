"""Does the runs of a comparison, each once: trains, asks, and keeps what came of it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import cast

import torch
from safetensors import SafetensorError

from reft_core.adapter import write_durably
from reft_core.errors import ReftError
from trainer.compare.answers import Answers
from trainer.compare.arena import Arena
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import CONTENDERS, Contender, Setting
from trainer.compare.jobs import search_jobs, search_settings
from trainer.compare.learners import open_learner
from trainer.compare.settings import shots_of, training_config
from trainer.compare.store import Job, Record, Store
from trainer.compare.task import Split, fit_on
from trainer.config import TrainConfig
from trainer.export import TOOL
from trainer.progress import Progress

_POLL_S = 2.0
"""Between looks at what other processes are still doing."""

FAILURES = (ReftError, SafetensorError, torch.linalg.LinAlgError, torch.OutOfMemoryError)  # type: ignore[attr-defined]
"""What a run may end in without ending the others: its settings suit neither base nor machine."""


@dataclass(frozen=True)
class Runner:
    """Does jobs, each once."""

    arena: Arena
    comparison: CompareConfig
    store: Store
    command: str
    progress: Progress

    def do(self, jobs: Sequence[Job], work: Callable[[Job], Record]) -> None:
        """Return once every job has a result of ``work``, by this process or another."""
        while waiting := [job for job in jobs if self.store.read(job) is None]:
            busy = True
            for job in waiting:
                with self.store.claim(job) as mine:
                    if mine:
                        busy = False
                        self.store.write(job, self._record(job, work))
            if busy:
                time.sleep(_POLL_S)

    def read(self, job: Job) -> Record:
        """The result of a job that is done."""
        record = self.store.read(job)
        assert record is not None
        return record

    def best(self, contender: Contender) -> Setting | None:
        """The setting of the highest validation metric, then of the lowest validation loss."""
        jobs = search_jobs(self.arena.task, [contender], self.comparison)
        if not jobs:
            return search_settings(self.arena.task, contender, self.comparison)[0]
        found = [record for record in map(self.read, jobs) if record["status"] == "done"]
        best = max(found, key=_quality, default=None)
        return None if best is None else best["setting"]

    def _record(self, job: Job, work: Callable[[Job], Record]) -> Record:
        with self.progress.stage(f"{job.phase} {job.method} {job.name}"):
            start = time.perf_counter()
            try:
                found = {"status": "done", **work(job)}
            except FAILURES as error:
                found = {"status": "failed", "error": str(error)}
            if found["status"] == "failed":
                torch.cuda.empty_cache()  # what it allocated is the next one's
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

    def run(self, job: Job, test: Split | None = None) -> Record:
        """Train, or prompt, as a job says; without ``test`` on the validation rows."""
        contender = CONTENDERS[job.method]
        if contender.kind == "prompting":
            return self._prompted(job, test)
        config = training_config(
            self.arena, contender, dict(job.setting), job.seed, self.comparison
        )
        return self._trained(job, config, test)

    def _prompted(self, job: Job, test: Split | None) -> Record:
        """The base with nothing, or with examples, before the question."""
        contender = CONTENDERS[job.method]
        shots = shots_of(self.arena.task, contender, dict(job.setting), self.comparison)
        record: Record = {
            "num_trainable": 0,
            "file_bytes": 0,
            "training_seconds": 0.0,
            "training_cpu_seconds": 0.0,
        }
        if test is None:
            return record | {"valid": self.arena.prompted_validated(shots, job.seed)}
        answers, cost = self.arena.prompted(shots, job.seed, test)
        return record | {"serving": asdict(cost)} | self._test(answers, test)

    def _trained(self, job: Job, config: TrainConfig, test: Split | None) -> Record:
        arena, task, contender = self.arena, self.arena.task, CONTENDERS[job.method]
        with open_learner(contender, config, task) as learner:
            model = learner.model
            result = fit_on(task, config, model)
            saved = learner.save(result)
            if job.phase == "final" and saved.file is not None:
                write_durably(self.store.adapter_path(job), saved.file)
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
                return record | {"valid": arena.validated(model, config, result)}
            answers = None if arena.serves(saved) else arena.asked(model, config, test)
        if answers is None:
            answers = arena.served(saved, test)
        cost = arena.cost(contender, saved, record["num_trainable"], test)
        return record | {"serving": asdict(cost)} | self._test(answers, test)

    def _test(self, answers: Answers, test: Split) -> Record:
        value = self.arena.value(answers, test)
        return {"test": {self.arena.metric.name: value}, "answers": answers.to_json()}


def _quality(record: Record) -> tuple[float, float]:
    """Higher is better."""
    scores = cast(dict[str, float], record["valid"])
    others = [value for name, value in scores.items() if name != "loss"]
    return (others[0] if others else 0.0, -scores["loss"])

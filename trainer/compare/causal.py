"""Comparisons on a causal model: the likeliest label, or the answer that is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from trainer.compare import serving
from trainer.compare.answering import answer_by_engine, answer_by_model
from trainer.compare.answers import Answers
from trainer.compare.arena import Arena
from trainer.compare.contenders import Contender
from trainer.compare.learners import Saved
from trainer.compare.prompting import with_shots
from trainer.compare.serving import Serving, Workload
from trainer.compare.task import Split
from trainer.config import TrainConfig
from trainer.evaluation.scoring import METRICS, Metric
from trainer.outcome import FitResult


@dataclass(frozen=True)
class CausalArena(Arena):
    """Implements :class:`Arena`."""

    by: str | None = None
    """A metric in place of the config's first."""

    @property
    @override
    def metric(self) -> Metric:
        """Choosing among labels, or the config's first metric."""
        config = self.task.config
        return METRICS["likelihood_accuracy" if config.labels else self.by or config.metrics[0]]

    @override
    def why_not(self, contender: Contender) -> str | None:
        if contender.kind == "head" and not self.labels:
            return "a head writes no text, so that it needs labels in the config"
        return None

    @override
    def validated(self, model: Any, config: TrainConfig, result: FitResult) -> dict[str, float]:
        loss = result.best.valid_loss
        if self.metric.needs != "choice":
            return {"loss": loss}
        answers = answer_by_model(self.task, self.task.valid, self.metric, model, config.rule)
        return {"loss": loss, self.metric.name: self.value(answers, self.task.valid)}

    @override
    def asked(self, model: Any, config: TrainConfig, test: Split) -> Answers:
        return answer_by_model(self.task, test, self.metric, model, config.rule)

    @override
    def serves(self, saved: Saved) -> bool:
        return self.metric.needs == "text" and saved.adapter is not None

    @override
    def served(self, saved: Saved, test: Split) -> Answers:
        return answer_by_engine(self.task, test, self.metric, saved.adapter)

    @override
    def cost(self, contender: Contender, saved: Saved, num_trained: int, test: Split) -> Serving:
        work = self._work(test)
        if saved.adapter is not None:
            return serving.of_adapter(work, saved.adapter)
        if contender.kind == "head":
            return serving.head(work, num_trained)
        return serving.own_weights()

    @override
    def prompted_validated(self, shots: int, seed: int) -> dict[str, float]:
        asked = with_shots(self.task, self.task.valid, shots, seed)
        losses = answer_by_engine(self.task, asked, METRICS["loss"]).losses
        loss = math.fsum(x for x, _ in losses) / sum(count for _, count in losses)
        if self.metric.needs != "choice":
            return {"loss": loss}
        answers = answer_by_engine(self.task, asked, self.metric)
        return {"loss": loss, self.metric.name: self.value(answers, asked)}

    @override
    def prompted(self, shots: int, seed: int, test: Split) -> tuple[Answers, Serving]:
        asked = with_shots(self.task, test, shots, seed)
        extra = self._work(asked).prompt - self._work(test).prompt
        cost = serving.longer_prompt(self._work(test), extra) if shots else serving.none()
        return answer_by_engine(self.task, asked, self.metric), cost

    def _work(self, split: Split) -> Workload:
        return Workload.of(self.task.loaded.description, split.rows)

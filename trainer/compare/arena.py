"""What one kind of base brings to a comparison, so that a comparison is one flow for all.

A causal model writes its answers or finds one the likeliest, an encoder's head gives them at
once, an encoder-decoder writes them from edited prompts. :func:`arena_for` looks at the task's
base and returns the :class:`Arena` that knows; :class:`trainer.compare.runner.Runner` runs any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reft_core.errors import TrainingError, explain
from trainer.compare.answers import Answers, References
from trainer.compare.contenders import Contender
from trainer.compare.learners import Saved
from trainer.compare.serving import Serving
from trainer.compare.task import Split, Task
from trainer.config import TrainConfig
from trainer.evaluation.scoring import Metric, value_of
from trainer.outcome import FitResult


@dataclass(frozen=True)
class Arena(ABC):
    """A task, and how whoever is compared on it is asked."""

    task: Task

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """What the comparison is about."""

    @abstractmethod
    def why_not(self, contender: Contender) -> str | None:
        """Why a method has no place here, for people; None if it has."""

    def check(self, config: TrainConfig) -> None:
        """Raise :class:`TrainingError` for settings that make no sense on the base."""
        config.placement(self.task.loaded.description)

    @abstractmethod
    def validated(self, model: Any, config: TrainConfig, result: FitResult) -> dict[str, float]:
        """What a setting is chosen by: the loss on the validation rows and, if it can be had
        soon, the metric."""

    @abstractmethod
    def asked(self, model: Any, config: TrainConfig, test: Split) -> Answers:
        """Answers of a trained model, while the base is as it needs it."""

    def serves(self, saved: Saved) -> bool:
        """Whether what was saved is asked, as it is served, and not the model."""
        return False

    def served(self, saved: Saved, test: Split) -> Answers:
        """Answers of what was saved, on the base as it was."""
        raise NotImplementedError

    @abstractmethod
    def cost(self, contender: Contender, saved: Saved, num_trained: int, test: Split) -> Serving:
        """What a trained method costs when it serves."""

    def prompted_validated(self, shots: int, seed: int) -> dict[str, float]:
        """:meth:`validated` of the base itself, with ``shots`` examples before each prompt."""
        raise NotImplementedError

    def prompted(self, shots: int, seed: int, test: Split) -> tuple[Answers, Serving]:
        """Answers of the base itself, with ``shots`` examples before each prompt, and their
        cost."""
        raise NotImplementedError

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes in order; none where there are no classes."""
        return self.task.config.labels or ()

    def references(self, split: Split) -> list[References]:
        """The right answers to each row."""
        return split.references

    def value(self, answers: Answers, split: Split) -> float:
        """The metric of some answers."""
        return value_of(self.metric, answers.against(self.references(split)), self.labels)

    def sort(self, contenders: Iterable[Contender]) -> tuple[list[Contender], dict[str, str]]:
        """Those that have a place here, and by name why the others have none."""
        reasons = {contender: self.why_not(contender) for contender in contenders}
        fit = [contender for contender, reason in reasons.items() if reason is None]
        return fit, {c.name: reason for c, reason in reasons.items() if reason is not None}


def arena_for(task: Task, metric: str | None = None) -> Arena:
    """The arena of a task's kind of base; ``metric`` is in place of the one its config says.

    Raises :class:`TrainingError` for a base that cannot be asked for ``metric``.
    """
    if metric is not None and (task.kind != "causal" or task.config.labels):
        allowed = "none: only a causal model's free answers are compared by it"
        raise TrainingError(explain("metric", metric, allowed), field="metric")
    if task.kind == "encoder":
        from trainer.compare.encoder import EncoderArena

        return EncoderArena(task)
    if task.kind == "seq2seq":
        from trainer.compare.seq2seq import Seq2SeqArena

        return Seq2SeqArena(task)
    from trainer.compare.causal import CausalArena

    return CausalArena(task, metric)

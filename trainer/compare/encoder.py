"""Comparisons on an encoder: every method has a head, and the head gives the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from trainer.classify.model import ClassifierModel
from trainer.classify.task import ClassifyTask
from trainer.compare import serving
from trainer.compare.answers import Answers, References
from trainer.compare.arena import Arena
from trainer.compare.contenders import Contender
from trainer.compare.learners import Saved
from trainer.compare.serving import Serving, Workload
from trainer.compare.task import Split
from trainer.config import TrainConfig
from trainer.evaluation.scoring import METRICS, Metric
from trainer.outcome import FitResult


@dataclass(frozen=True)
class EncoderArena(Arena):
    """Implements :class:`Arena`."""

    @property
    def _shared(self) -> ClassifyTask:
        shared = self.task.shared
        assert isinstance(shared, ClassifyTask)
        return shared

    @property
    @override
    def metric(self) -> Metric:
        """The config's first, or accuracy; of a regression Pearson's correlation."""
        return METRICS[self._shared.metrics[0]]

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return self._shared.labels or ()

    @override
    def why_not(self, contender: Contender) -> str | None:
        if contender.kind == "prompting":
            return "an encoder writes no answers, and its head is not there before it is trained"
        if contender.size == "prefix_length":
            return "an encoder has no place for virtual tokens"
        return None

    @override
    def validated(self, model: Any, config: TrainConfig, result: FitResult) -> dict[str, float]:
        name = self.metric.name
        return {"loss": result.best.valid_loss, name: result.best.valid_metrics[name]}

    @override
    def asked(self, model: Any, config: TrainConfig, test: Split) -> Answers:
        return Answers(texts=tuple(self._shared.said(self.outputs(model, test))))

    def outputs(self, model: ClassifierModel, split: Split) -> Tensor:
        """Logits or values (n, L) of a trained model."""
        return self._shared.outputs(model, split.rows)[0]

    @override
    def cost(self, contender: Contender, saved: Saved, num_trained: int, test: Split) -> Serving:
        if saved.adapter is None:
            return serving.own_weights()
        lengths = tuple(len(row.tokens) for row in test.rows)
        return serving.of_adapter(Workload(self.task.loaded.description, lengths), saved.adapter)

    @override
    def references(self, split: Split) -> list[References]:
        """Labels, or values."""
        return [(str(example.label),) for example in split.dataset.examples]

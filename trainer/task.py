"""What one kind of base model brings to a training run, so that a run is one flow for all.

A causal model, an encoder with a head and an encoder-decoder differ in what a row is, how
rows make a batch, what is measured and what the adapter file holds. :func:`task_for` looks at
the base model and returns the :class:`Task` that knows; :func:`trainer.fit.fit` trains any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from reft_core.adapter import Adapter, EditKey, Head, Prefix
from reft_core.edits import Edit
from reft_core.loading import LoadedModel, ModelKind, model_kind
from reft_core.spec import HeadSpec, PrefixSpec, SiteSpec, TaskSpec, TemplateSpec

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.data import Dataset
    from trainer.evaluation.splits import Evaluation
    from trainer.progress import Progress


class TrainedModel(Protocol):
    """What the training loop asks of a model: a module whose frozen base never changes.

    Calling it with a batch's fields returns a mapping that has the batch's ``loss``.
    """

    def __call__(self, **batch: Any) -> Mapping[str, Any]:
        """The forward."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and batches are to be."""

    @property
    def interventions(self) -> Iterable[nn.Module]:
        """Those that edit states, which compute in float32 always."""

    def trainable(self) -> list[nn.Parameter]:
        """The parameters the optimiser may change."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """:meth:`trainable` as torch's optimisers take them, each group with its own rate."""

    def trained_state(self) -> list[dict[str, Tensor]]:
        """A copy of what training changes."""

    def load_trained_state(self, state: Sequence[dict[str, Tensor]]) -> None:
        """Put back what :meth:`trained_state` returned."""


@dataclass(frozen=True)
class Measured:
    """How good the model is at present on some rows."""

    loss: float
    """As it is trained, over all of the rows."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """By name, higher is better."""
    chosen_by: str | None = None
    """The metric that chooses the epoch to keep, the loss among equals; None: the loss."""

    @property
    def rank(self) -> tuple[float, float]:
        """Of two epochs the better one has the higher."""
        return (self.metrics[self.chosen_by] if self.chosen_by else 0.0), -self.loss


EpochOrder = Callable[[int], Sequence[int]]
"""From the number of an epoch, from 0, to the training rows in their order."""

Measure = Callable[[Sequence[Any]], Measured]
"""From tokenised rows to how good the model is on them."""


@dataclass(frozen=True)
class TrainedParts:
    """What a training leaves for the adapter file, beside its provenance."""

    edits: Mapping[EditKey, Edit]
    task: TaskSpec
    sites: Mapping[str, SiteSpec] = field(default_factory=dict)
    prefix: Prefix | None = None
    prefix_spec: PrefixSpec | None = None
    head: Head | None = None
    head_spec: HeadSpec | None = None
    template: TemplateSpec | None = None


HeldOut = Mapping[str, tuple["Dataset", Sequence[Any]]]
"""Examples by split, and the same ones as tokens."""


class Task(Protocol):
    """One run's rows, and how they are trained on, measured and written. Made by :func:`task_for`.

    It holds no model: whoever trains asks for :meth:`new_model` and hands it back to the others.
    """

    @property
    def kind(self) -> ModelKind:
        """What kind of base it trains on."""

    @property
    def rows(self) -> Mapping[str, Sequence[Any]]:
        """The tokenised rows by split."""

    @property
    def collator(self) -> Callable[[Sequence[Any]], Any]:
        """From rows to the batch that the model takes."""

    def new_model(self) -> TrainedModel:
        """The base with what is to be trained, drawn from the seed."""

    def order(self, epoch: int) -> Sequence[int]:
        """The training rows in the order of one epoch, drawn from the seed."""

    def prompt_of(self, row: Any) -> Sequence[int]:
        """The tokens of a row that positions count."""

    def measure(self, model: Any, rows: Sequence[Any]) -> Measured:
        """Loss and metrics of ``model`` as it is, over all of ``rows``."""

    def parts(self, model: Any) -> TrainedParts:
        """What ``model`` has learnt."""

    def probe(self, model: Any, held_out: HeldOut, progress: Progress) -> dict[str, float]:
        """What serving does not tell of ``model``, by name."""

    def evaluate(
        self, adapter: Adapter, held_out: HeldOut, progress: Progress
    ) -> dict[str, Evaluation]:
        """How the file's adapter does when it is served, by split. Asked last: what serves takes
        the base over."""

    def with_settings(self, config: TrainConfig) -> Self:
        """The same rows under settings that do not change them."""


def task_for(config: TrainConfig, loaded: LoadedModel, datasets: Mapping[str, Dataset]) -> Task:
    """The task of ``config`` on this base, its rows tokenised.

    Raises :class:`TrainingError` for rows or settings that the kind of base cannot use.
    """
    kind = model_kind(loaded.model.config)
    if kind == "encoder":
        from trainer.classify.task import ClassifyTask

        return ClassifyTask.of(config, loaded, datasets)
    if kind == "seq2seq":
        from trainer.seq2seq.task import Seq2SeqTask

        return Seq2SeqTask.of(config, loaded, datasets)
    from trainer.causal import CausalTask

    return CausalTask.of(config, loaded, datasets)

"""What one kind of base model brings to a training run, so that a run is one flow for all.

A causal model, an encoder with a head and an encoder-decoder differ in what a row is, how
rows make a batch, what is measured and what the adapter file holds. :func:`task_for` looks at
the base model and returns the :class:`Task` that knows; :func:`trainer.fit.fit` trains any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from reft_core.adapter import EditKey, Head, Prefix
from reft_core.edits import Edit
from reft_core.loading import LoadedModel, ModelKind, model_kind
from reft_core.spec import HeadSpec, PrefixSpec, SiteSpec, TaskSpec, TemplateSpec

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.data import Dataset


class TrainedModel(Protocol):
    """What the training loop asks of a model: a module whose frozen base never changes.

    Calling it with a batch's fields returns a mapping that has the batch's ``loss``.
    """

    def __call__(self, **batch: Any) -> Mapping[str, Any]:
        """The forward."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and batches are to be."""

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


class Task(Protocol):
    """One run's model, its rows, and how they are measured. Made by :func:`task_for`."""

    @property
    def kind(self) -> ModelKind:
        """What kind of base it trains on."""

    @property
    def rows(self) -> Mapping[str, Sequence[Any]]:
        """The tokenised rows by split."""

    @property
    def model(self) -> TrainedModel:
        """The base with what is trained."""

    @property
    def collator(self) -> Callable[[Sequence[Any]], Any]:
        """From rows to the batch that :attr:`model` takes."""

    def order(self, epoch: int) -> Sequence[int]:
        """The training rows in the order of one epoch, drawn from the run's seed."""

    def measure(self, rows: Sequence[Any]) -> Measured:
        """Loss and metrics of :attr:`model` as it is, over all of ``rows``."""

    def parts(self) -> TrainedParts:
        """What :attr:`model` has learnt."""


def task_for(config: TrainConfig, loaded: LoadedModel, datasets: Mapping[str, Dataset]) -> Task:
    """The task of ``config`` on an encoder or encoder-decoder, tokenised and untrained.

    Raises :class:`TrainingError` for rows or settings that the kind of base cannot use.
    """
    examples: dict[str, Sequence[Any]] = {
        split: dataset.examples for split, dataset in datasets.items()
    }
    if model_kind(loaded.model.config) == "encoder":
        from trainer.classify.task import ClassifyTask

        return ClassifyTask.of(config, loaded, examples)
    from trainer.seq2seq.task import Seq2SeqTask

    return Seq2SeqTask.of(config, loaded, examples)

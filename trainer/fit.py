"""The training loop: transformers' Trainer over intervention parameters alone."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from typing_extensions import override

from reft_core.errors import TrainingError
from trainer.collate import IGNORED
from trainer.config import TrainConfig
from trainer.progress import Progress
from trainer.task import EpochOrder, Measure, Measured, TrainedModel


@dataclass(frozen=True)
class Epoch:
    """Losses after one pass over the training rows, per completion token."""

    number: int
    """From 1; 0 is the untrained model."""
    train_loss: float | None
    """Mean over the epoch's steps; None for epoch 0."""
    valid_loss: float
    valid_metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FitResult:
    """What the loop did. The model holds the best epoch's parameters."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    num_steps: int
    seconds: float
    """In training steps alone, validation left out."""


def fit(
    model: TrainedModel,
    train: Sequence[Any],
    valid: Sequence[Any],
    config: TrainConfig,
    collator: Callable[[Sequence[Any]], Any],
    progress: Progress,
    measure: Measure | None = None,
    order: EpochOrder | None = None,
) -> FitResult:
    """Train ``model`` in place and leave it with the best epoch on ``valid``.

    ``measure`` says which that is; without it, the one of lowest mean loss over completion
    tokens. ``order`` orders the rows of ``train``, else they are shuffled.

    Deterministic for a seed on one machine. Raises :class:`TrainingError` as soon as a
    loss is not finite.
    """
    measured = measure or (lambda rows: Measured(mean_loss(model, rows, config, collator)))
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer insists on a folder
        num_steps = config.epochs * math.ceil(len(train) / config.batch_size)
        with progress.stage("training", num_steps) as advance:
            epochs = _EpochKeeper(model, lambda: measured(valid))
            trainer = _ReftTrainer(
                model=model,
                args=_arguments(config, scratch),
                data_collator=collator,
                train_dataset=train,
                callbacks=[epochs],
                optimizers=(_optimizer(model, config), None),
                on_loss=lambda loss: advance(f"loss {loss:.4f}"),
                order=order,
            )
            trainer.remove_callback(PrinterCallback)
            try:
                trainer.train()
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                # A basis that has no orthonormal form any more; the step size put it there.
                raise diverged("a basis lost its rank") from error
    assert epochs.best is not None
    model.load_trained_state(epochs.best_parameters)
    return FitResult(tuple(epochs.epochs), epochs.best, num_steps, trainer.step_seconds)


def batches(
    rows: Sequence[Any],
    size: int,
    collator: Callable[[Sequence[Any]], Any],
    device: torch.device,
) -> Iterator[Any]:
    """``rows`` in order, in the collator's batches on ``device``."""
    for start in range(0, len(rows), size):
        yield send_to_device(collator(rows[start : start + size]), device)


@torch.no_grad()
def mean_loss(
    model: TrainedModel,
    rows: Sequence[Any],
    config: TrainConfig,
    collator: Callable[[Sequence[Any]], Any],
) -> float:
    """Mean loss over all completion tokens of ``rows``, however they fall into batches."""
    total, count = 0.0, 0
    for batch in batches(rows, config.batch_size, collator, model.device):
        num_tokens = int((batch["labels"] != IGNORED).sum())
        total += model(**batch)["loss"].item() * num_tokens
        count += num_tokens
    return total / count


def diverged(what: str) -> TrainingError:
    """The error for a training that no longer has finite numbers."""
    return TrainingError(
        f"training: {what}; nothing was written. A lower learning_rate usually helps",
        field="learning_rate",
    )


def _optimizer(model: TrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the interventions; weight decay cannot harm a basis (see orthonormalise)."""
    return torch.optim.AdamW(
        model.parameter_groups(config.learning_rate), weight_decay=config.weight_decay
    )


def _arguments(config: TrainConfig, scratch: str) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_strategy="no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # we stop at such a loss instead of hiding it
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # rows are ours, not columns of a data set
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        # nn.DataParallel would copy the hooked base; processes (accelerate launch) do not.
        arguments._n_gpu = 1
    return arguments


class _OrderedSampler(Sampler[int]):
    """Rows in the order that a task gives an epoch."""

    def __init__(self, order: EpochOrder) -> None:
        self._order = order
        self._rows = order(0)

    def set_epoch(self, epoch: int) -> None:
        """Take another epoch's order; the Trainer calls this."""
        self._rows = self._order(epoch)

    def __len__(self) -> int:
        return len(self._rows)

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)


class _ReftTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """A Trainer that reports each step's loss and stops when it is not finite."""

    def __init__(
        self, *, on_loss: Callable[[float], None], order: EpochOrder | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._on_loss = on_loss
        self._order = order
        self.step_seconds = 0.0

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self._order is not None:
            return _OrderedSampler(self._order)
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        return sampler

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        start = time.perf_counter()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        self.step_seconds += time.perf_counter() - start
        if not math.isfinite(value):
            raise diverged(f"the loss became {value} at step {self.state.global_step + 1}")
        self._on_loss(value)
        return loss


class _EpochKeeper(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Measures the model after every epoch and keeps the best one's parameters."""

    def __init__(self, model: TrainedModel, measure: Callable[[], Measured]) -> None:
        self.epochs: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_parameters: list[dict[str, Tensor]] = []
        self._best_rank = (-math.inf, -math.inf)
        self._model = model
        self._measure = measure

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self._measure()
        self.epochs.append(Epoch(0, None, found.loss, found.metrics))

    @override
    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" not in logs:  # the summary after the last epoch
            return
        found = self._measure()
        epoch = Epoch(len(self.epochs), logs["loss"], found.loss, found.metrics)
        if not math.isfinite(epoch.valid_loss):
            raise diverged(f"the validation loss became {epoch.valid_loss}")
        self.epochs.append(epoch)
        if found.rank > self._best_rank:
            self.best, self._best_rank = epoch, found.rank
            self.best_parameters = self._model.trained_state()

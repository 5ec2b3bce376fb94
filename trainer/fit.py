"""The training loop: transformers' Trainer over intervention parameters alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.batches import batches
from trainer.collate import IGNORED
from trainer.config import TrainConfig
from trainer.loop import ReftTrainer
from trainer.order import in_order, num_steps, spread
from trainer.outcome import Epoch, FitResult, diverged
from trainer.processes import summed, world
from trainer.progress import Progress
from trainer.task import EpochOrder, Measure, Measured, TrainedModel
from trainer.validation import Validation


def fit(
    model: TrainedModel,
    train: Sequence[Any],
    valid: Sequence[Any],
    config: TrainConfig,
    collator: Callable[[Sequence[Any]], Any],
    progress: Progress,
    *,
    measure: Measure | None = None,
    order: EpochOrder | None = None,
    checkpoint: Path | None = None,
    run: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> FitResult:
    """Train ``model`` in place and leave it with the best parameters on ``valid``.

    ``measure`` says which those are; without it, those of lowest mean loss over completion
    tokens. ``order`` gives the rows of ``train`` an order for each epoch, else they are shuffled.
    ``on_epoch`` is called after each validation and may raise to end the training.
    Goes on from ``checkpoint`` if there is one; those that are written hold ``run``, which says
    what belongs to them. Deterministic for a seed on one machine, also
    when it was interrupted. Raises :class:`TrainingError` as soon as a loss is not finite.
    """
    rows = spread(valid, config.valid_rows)
    measured = measure or (lambda rows: Measured(mean_loss(model, rows, config, collator)))
    with (
        tempfile.TemporaryDirectory() as scratch,  # the Trainer insists on a folder
        progress.stage("training", num_steps(config, len(train))) as advance,
    ):
        validation = Validation(model, config, len(train), lambda: measured(rows), on_epoch)
        trainer = ReftTrainer(
            model,
            in_order(train, config, order),
            config,
            collator,
            validation,
            scratch=scratch,
            run=run or {},
            on_loss=lambda loss: advance(f"loss {loss:.4f}"),
        )
        try:
            trainer.run(checkpoint)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            # A basis that has no orthonormal form any more; the step size put it there.
            raise diverged("a basis lost its rank") from error
    return validation.finish(
        trainer.state.global_step, trainer.step_seconds, trainer.step_cpu_seconds
    )


@torch.no_grad()
def mean_loss(
    model: TrainedModel,
    rows: Sequence[Any],
    config: TrainConfig,
    collator: Callable[[Sequence[Any]], Any],
) -> float:
    """Mean loss over all completion tokens of ``rows``, however they fall into batches.

    Each process measures its share; all must call this.
    """
    process, num_processes = world()
    own = rows[process::num_processes]
    total, count = 0.0, 0.0
    for batch in batches(own, config.batch_size, collator, model.device):
        num_tokens = int((batch["labels"] != IGNORED).sum())
        total += model(**batch)["loss"].item() * num_tokens
        count += num_tokens
    total, count = summed((total, count))
    return total / count


__all__ = ["Epoch", "FitResult", "batches", "diverged", "fit", "mean_loss"]

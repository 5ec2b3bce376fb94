"""What the training loop reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reft_core.errors import TrainingError


@dataclass(frozen=True)
class Epoch:
    """Losses after one pass over the rows, or after ``eval_steps``, per completion token."""

    number: int
    """From 1; 0 is the untrained model."""
    train_loss: float | None
    """Mean over the steps since the one before; None for the untrained model."""
    valid_loss: float
    step: int = 0
    """Steps trained so far."""
    valid_metrics: Mapping[str, float] = field(default_factory=dict)
    """What else is measured of the validation rows, by name."""


@dataclass(frozen=True)
class FitResult:
    """What the loop did. The model holds the best epoch's parameters."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    num_steps: int
    seconds: float
    """In training steps alone, validation left out. A process that is stopped lets them pass."""
    cpu_seconds: float
    """Of this process's threads together in those steps: neither a pause nor what else the
    machine does adds to them. What an accelerator computes does not count."""
    train_losses: tuple[tuple[int, float], ...] = ()
    """Step, and the mean training loss up to it since the one before: every step's in a run that
    is not long."""


def diverged(what: str) -> TrainingError:
    """The error for a training that no longer has finite numbers."""
    return TrainingError(
        f"training: {what}; nothing was written. A lower learning_rate usually helps",
        field="learning_rate",
    )

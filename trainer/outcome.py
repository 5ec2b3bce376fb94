"""What the training loop reports."""

from __future__ import annotations

import math
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


_HARM = 1.1
"""A training loss so many times the first validation's is not the noise of its last rows."""


def check_learnt(result: FitResult) -> str | None:
    """A warning about a training after which no validation was better than the one before it.

    Raises :class:`TrainingError` where the training loss ended above that one too: no parameters
    are worth keeping then, although they are finite.
    """
    start, *later = result.epochs
    lowest, last = min(later, key=lambda epoch: epoch.valid_loss), later[-1]
    scores = result.best.valid_metrics.items()
    better = any(score > start.valid_metrics.get(name, math.inf) for name, score in scores)
    if better or lowest.valid_loss < start.valid_loss:
        return None
    found = (
        f"the validation loss was {start.valid_loss:.4g} before training and never lower after it "
        f"(at best {lowest.valid_loss:.4g}, at step {lowest.step})"
    )
    if last.train_loss is not None and last.train_loss > _HARM * start.valid_loss:
        raise diverged(f"{found}, and the training loss ended at {last.train_loss:.4g}")
    return (
        f"{found}; by that measure the adapter is no better than the base. A lower "
        "learning_rate, or more rows, usually helps"
    )


def diverged(what: str) -> TrainingError:
    """The error for a training that led nowhere."""
    return TrainingError(
        f"training: {what}; nothing was written. A lower learning_rate usually helps",
        field="learning_rate",
    )

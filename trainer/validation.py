"""What happens between steps: validation, early stopping, and when a checkpoint is due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from typing_extensions import override

from trainer.config import TrainConfig
from trainer.curve import Curve
from trainer.order import steps_between_validations
from trainer.outcome import Epoch, FitResult, diverged
from trainer.processes import summed, world
from trainer.task import Measured, TrainedModel


class Validation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Measures the model on the validation rows now and then, and keeps the best parameters."""

    def __init__(
        self,
        model: TrainedModel,
        config: TrainConfig,
        num_rows: int,
        measure: Callable[[], Measured],
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> None:
        self.log: Callable[[dict[str, float]], None] = lambda logs: None
        self.revisit: Callable[[int], None] = lambda steps: None
        self._model = model
        self._config = config
        self.num_rows = num_rows
        self._measure = measure
        self._on_epoch = on_epoch
        self._epochs: list[Epoch] = []
        self._best: Epoch | None = None
        self._best_rank = (-math.inf, -math.inf)
        self._best_parameters: list[dict[str, Tensor]] = []
        self._losses: list[float] = []
        """Of this process's steps since the last validation."""
        self._curve = Curve()
        """Of all steps before it."""

    def note(self, loss: float) -> None:
        """Take this process's share of a step's loss."""
        self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this."""
        return {
            "epochs": [vars(epoch) for epoch in self._epochs],
            "best": None if self._best is None else vars(self._best),
            "best_parameters": self._best_parameters,
            "best_rank": self._best_rank,
            "losses": self._losses,
            "curve": self._curve.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self._epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self._best = None if state["best"] is None else Epoch(**state["best"])
        self._best_parameters = state["best_parameters"]
        self._best_rank = tuple(state["best_rank"])
        self._losses = state["losses"]
        self._curve = Curve(**state["curve"])

    def finish(self, steps: int, seconds: float, cpu_seconds: float) -> FitResult:
        """Give the model its best parameters back, and say how it went."""
        assert self._best is not None
        self._model.load_trained_state(self._best_parameters)
        losses = self._curve.steps()
        return FitResult(tuple(self._epochs), self._best, steps, seconds, cpu_seconds, losses)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            return
        # Also when going on from a checkpoint: what is kept of it counts among what steps use.
        found = self._measure()
        if self._epochs:
            self.revisit(state.global_step)
        else:
            self._note(Epoch(0, None, found.loss, valid_metrics=dict(found.metrics)), control)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        state.epoch = step * self._config.batch_size / self.num_rows
        every = steps_between_validations(self._config, self.num_rows)
        if step % every and step != state.max_steps:
            return
        num_processes = world()[1]
        losses = [loss / num_processes for loss in summed(self._losses)]
        train_loss = sum(losses) / len(losses)
        found = self._measure()
        metrics = dict(found.metrics)
        epoch = Epoch(len(self._epochs), train_loss, found.loss, step, metrics)
        if not math.isfinite(epoch.valid_loss):
            raise diverged(f"the validation loss became {epoch.valid_loss}")
        self._losses = []
        self._curve.extend(losses)
        self._note(epoch, control)
        if self._best is None or found.rank > self._best_rank:
            self._best, self._best_rank = epoch, found.rank
            self._best_parameters = self._model.trained_state()
        self._on_epoch(epoch)
        patience = self._config.patience
        if patience is not None and epoch.number - self._best.number >= patience:
            control.should_training_stop = True

    def _note(self, epoch: Epoch, control: Any) -> None:
        """Keep what was measured, and tell the trackers; a step's own log still comes if due."""
        self._epochs.append(epoch)
        due = control.should_log
        metrics = {f"eval_{name}": value for name, value in epoch.valid_metrics.items()}
        self.log({"eval_loss": epoch.valid_loss, **metrics})
        control.should_log = due


class Saving(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Says when a checkpoint is due."""

    def __init__(self, config: TrainConfig) -> None:
        self._steps = config.checkpoint_steps
        self._seconds = config.checkpoint_seconds
        self._last = time.monotonic()

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            due = state.global_step % self._steps == 0
        else:
            due = time.monotonic() - self._last >= self._seconds
        if due:
            control.should_save = True
            self._last = time.monotonic()

"""One trial: a draw of settings, trained and judged on the validation rows.

The test split is not here: a :class:`~trainer.compare.task.Task` has no test rows, and the
config that makes it is given none.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from reft_core.errors import ReftError, TrainingError, explain
from reft_core.methods import METHODS
from trainer.compare.arena import Arena
from trainer.compare.settings import sites_for
from trainer.compare.task import fit_on, run_config
from trainer.config import TrainConfig
from trainer.fit import Epoch
from trainer.sweep.config import Objective
from trainer.sweep.space import Draws, Space, settings_of

REPORTS = 5
"""Validations of a training whose length is in steps, at each of which it may be given up."""


class Pruned(Exception):
    """A training was given up, as others did better by then."""


class Trial(Draws, Protocol):
    """An Optuna trial."""

    def report(self, value: float, step: int) -> None:
        """Take an intermediate value."""

    def should_prune(self) -> bool:
        """Whether the trial does too badly to go on."""

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep a fact about the trial."""


def trial_config(arena: Arena, drawn: dict[str, Any]) -> TrainConfig:
    """The training config of a draw. Raises :class:`TrainingError` if it makes no sense."""
    config, model = arena.task.config, arena.task.loaded.description
    changes = settings_of(drawn, model.num_layers)
    method = changes.get("method", config.method)
    if method not in METHODS:
        allowed = "one that edits states, or a space of such methods"
        raise TrainingError(explain("method", method, allowed), field="method")
    if config.sites is None:
        changes["sites"] = sites_for(model, method)
    if METHODS[method].phase == "all":
        changes |= {"positions": "prompt", "tied": True}  # such methods are meant for every token
    changes |= {"checkpoint_seconds": 1e6, "resume": False, "report_to": "none"}
    if config.steps and not config.eval_steps:
        changes["eval_steps"] = -(-config.steps // REPORTS)
    config = run_config(config, changes)
    arena.check(config)
    return config


def run_trial(arena: Arena, space: Space, objective: Objective, trial: Trial) -> float:
    """Train what ``trial`` draws of ``space`` and return the objective on the validation rows.

    Reports the validation loss of each epoch. Raises :class:`Pruned` when the trial is given up,
    and :class:`TrainingError` when it cannot be trained.
    """
    config = trial_config(arena, space.draw(trial))
    model = arena.task.under(config).new_model()
    trial.set_user_attr("num_parameters", sum(p.numel() for p in model.trainable()))

    def on_epoch(epoch: Epoch) -> None:
        trial.report(epoch.valid_loss if objective == "loss" else -epoch.valid_loss, epoch.number)
        if trial.should_prune():
            raise Pruned(f"after epoch {epoch.number}")

    try:
        result = fit_on(arena.task, config, model, on_epoch)
    except (ReftError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise TrainingError(str(error)) from error
    trial.set_user_attr("training_seconds", round(result.seconds, 2))
    trial.set_user_attr("training_cpu_seconds", round(result.cpu_seconds, 2))
    trial.set_user_attr("valid_loss", result.best.valid_loss)
    if objective == "loss":
        return result.best.valid_loss
    return arena.validated(model, config, result)[arena.metric.name]

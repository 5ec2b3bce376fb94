"""One trial: a draw of settings, trained and judged on the validation rows.

The test split is not here: a :class:`~trainer.compare.task.Task` has no test rows, and the
config that makes it is given none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from reft_core.errors import TrainingError, explain
from reft_core.methods import METHODS
from trainer.compare.arena import Arena
from trainer.compare.runner import FAILURES
from trainer.compare.settings import sites_for
from trainer.compare.task import fit_on, run_config
from trainer.config import TrainConfig
from trainer.fit import Epoch
from trainer.sweep.config import Objective
from trainer.sweep.space import Draws, Space, settings_of

REPORTS = 5
"""Validations of a training whose length is in steps, at each of which it may be given up."""

SETTINGS = "settings"
"""User attribute of a trial: what it changed of the training config."""


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


def trial_settings(arena: Arena, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What a draw changes of the training config, where its method edits included.

    Raises :class:`TrainingError` if it makes no sense.
    """
    config, model = arena.task.config, arena.task.loaded.description
    changes = settings_of(drawn, model.num_layers)
    method = changes.get("method", config.method)
    if method not in METHODS:
        allowed = "one that edits states, or a space of such methods"
        raise TrainingError(explain("method", method, allowed), field="method")
    if config.sites is None and (sites := sites_for(model, method)) is not None:
        changes["sites"] = sites
    if METHODS[method].phase == "all":
        changes |= {"positions": "prompt", "tied": True}  # such methods are meant for every token
    return changes


def trial_config(arena: Arena, settings: Mapping[str, Any]) -> TrainConfig:
    """The config that a trial of these settings trains. Raises :class:`TrainingError`."""
    config = arena.task.config
    changes = {**settings, "checkpoint_seconds": 1e6, "resume": False, "report_to": "none"}
    if config.steps and not config.eval_steps:
        changes["eval_steps"] = -(-config.steps // REPORTS)
    config = run_config(config, changes)
    arena.check(config)
    return config


def run_trial(arena: Arena, space: Space, objective: Objective, trial: Trial) -> float:
    """Train what ``trial`` draws of ``space`` and return the objective on the validation rows.

    Reports the validation loss of each epoch and keeps the trial's settings. Raises
    :class:`Pruned` when the trial is given up, and :class:`TrainingError` when it cannot be
    trained.
    """
    settings = trial_settings(arena, space.draw(trial))
    config = trial_config(arena, settings)
    trial.set_user_attr(SETTINGS, settings)
    model = arena.task.under(config).new_model()
    trial.set_user_attr("num_parameters", sum(p.numel() for p in model.trainable()))

    def on_epoch(epoch: Epoch) -> None:
        trial.report(epoch.valid_loss if objective == "loss" else -epoch.valid_loss, epoch.number)
        if trial.should_prune():
            raise Pruned(f"after epoch {epoch.number}")

    try:
        result = fit_on(arena.task, config, model, on_epoch)
    except FAILURES as error:
        raise TrainingError(str(error)) from error
    trial.set_user_attr("training_seconds", round(result.seconds, 2))
    trial.set_user_attr("training_cpu_seconds", round(result.cpu_seconds, 2))
    trial.set_user_attr("valid_loss", result.best.valid_loss)
    if objective == "loss":
        return result.best.valid_loss
    return arena.validated(model, config, result)[arena.metric.name]

"""One trial: a draw of settings, trained and judged on the validation rows.

The test split is not here: a :class:`~trainer.compare.task.Task` has no test rows, and the
config that makes it is given none.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import set_seed

from reft_core.errors import ReftError, TrainingError
from reft_core.methods import METHODS
from trainer.collate import Collator
from trainer.compare.choosing import choose_labels
from trainer.compare.settings import sites_for
from trainer.compare.task import Task, run_config
from trainer.config import TrainConfig
from trainer.fit import Epoch, FitResult, fit
from trainer.progress import SilentProgress
from trainer.reft_model import ReftModel
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


def trial_config(task: Task, drawn: dict[str, Any]) -> TrainConfig:
    """The training config of a draw. Raises :class:`TrainingError` if it makes no sense."""
    config = task.config
    changes = settings_of(drawn, task.loaded.description.num_layers)
    method = changes.get("method", config.method)
    if config.sites is None:
        changes["sites"] = sites_for(task.loaded.description, method)
    if METHODS[method].phase == "all":
        changes |= {"positions": "prompt", "tied": True}  # such methods are meant for every token
    changes |= {"checkpoint_seconds": 1e6, "resume": False, "report_to": "none"}
    if config.steps and not config.eval_steps:
        changes["eval_steps"] = -(-config.steps // REPORTS)
    config = run_config(config, changes)
    config.placement(task.loaded.description)
    return config


def run_trial(task: Task, space: Space, objective: Objective, trial: Trial) -> float:
    """Train what ``trial`` draws of ``space`` and return the objective on the validation rows.

    Reports the validation loss of each epoch. Raises :class:`Pruned` when the trial is given up,
    and :class:`TrainingError` when it cannot be trained.
    """
    config = trial_config(task, space.draw(trial))
    set_seed(config.seed)
    model = ReftModel(
        task.loaded.model,
        config.placement(task.loaded.description),
        num_units=config.rule.num_units,
        prefixes=None,
    )
    trial.set_user_attr("num_parameters", sum(p.numel() for p in model.trainable()))

    def on_epoch(epoch: Epoch) -> None:
        trial.report(epoch.valid_loss if objective == "loss" else -epoch.valid_loss, epoch.number)
        if trial.should_prune():
            raise Pruned(f"after epoch {epoch.number}")

    collator = Collator(config.rule)
    try:
        result = fit(
            model,
            task.train.rows,
            task.valid.rows,
            config,
            collator,
            SilentProgress(),
            on_epoch=on_epoch,
        )
    except (ReftError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise TrainingError(str(error)) from error
    return _judged(task, config, model, result, objective, trial)


def _judged(
    task: Task,
    config: TrainConfig,
    model: ReftModel,
    result: FitResult,
    objective: Objective,
    trial: Trial,
) -> float:
    trial.set_user_attr("training_seconds", round(result.seconds, 2))
    trial.set_user_attr("valid_loss", result.best.valid_loss)
    if objective == "loss":
        return result.best.valid_loss
    chosen = choose_labels(
        model,
        task.valid.rows,
        task.label_answers,
        Collator(config.rule),
        batch_size=config.batch_size,
    )
    pairs = zip(chosen, task.valid.references, strict=True)
    return sum(label.strip() == right.strip() for label, right in pairs) / len(chosen)

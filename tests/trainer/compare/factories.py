"""A task on the tiny byte model, and what runs on it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.trainer.factories import byte_model, make_config
from trainer.compare.config import CompareConfig
from trainer.compare.task import Task, load_task
from trainer.reft_model import ReftModel


def tiny_task(folder: Path, **fields: object) -> Task:
    """Forty training and ten validation rows of a labeller with two labels."""
    given = {"labels": ("y", "n"), "epochs": 1} | fields
    return load_task(make_config(folder, **given), loaded=byte_model())


def tiny_comparison(folder: Path, **fields: object) -> CompareConfig:
    """A comparison whose results lie in ``folder``."""
    values = {"seeds": (0,), "search": 1, "out": folder / "compared"}
    return CompareConfig.model_validate(values | fields)


def moved_model(task: Task) -> ReftModel:
    """LoReFT on a task's base, moved away from where it starts."""
    config = task.config
    model = ReftModel(task.loaded.model, config.placement(task.loaded.description), num_units=1)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.add_(torch.randn_like(parameter))
    return model

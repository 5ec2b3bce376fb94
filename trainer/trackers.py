"""Curves for programs that draw them, through the callbacks that transformers has."""

from __future__ import annotations

import importlib.util
from typing import Any

from reft_core.errors import TrainingError, explain
from trainer.config import TrainConfig


def check_tracker(config: TrainConfig) -> None:
    """Raise :class:`TrainingError` if the tracker asked for is not installed."""
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise TrainingError(
            explain("report_to", config.report_to, "a package that is installed, or none"),
            field="report_to",
        )


def tracker_callbacks(config: TrainConfig) -> list[Any]:
    """The callbacks that send every step's loss, and every validation's, where they should go."""
    if config.report_to == "none":
        return []
    from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

    if config.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardCallback(SummaryWriter(str(config.report_dir / "tensorboard")))]
    return [{"wandb": WandbCallback, "trackio": TrackioCallback}[config.report_to]()]

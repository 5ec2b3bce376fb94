"""Curves for programs that draw them, through the callbacks that transformers has."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from transformers import TrainerCallback
from typing_extensions import override

from reft_core.errors import TrainingError, explain
from trainer.config import TrainConfig
from trainer.paths import without_places


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
    callback = {"wandb": WandbCallback, "trackio": TrackioCallback}[config.report_to]
    return [callback(), TellSettings(config)]


class TellSettings(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Tells wandb or trackio the run's settings, paths aside; transformers tells its own."""

    def __init__(self, config: TrainConfig) -> None:
        self._tracker: Any = importlib.import_module(config.report_to)
        self._settings = without_places(config)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # and the tracker's own callback has begun the run
            self._tracker.config.update({"reft": self._settings}, allow_val_change=True)

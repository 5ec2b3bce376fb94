"""Which checkpoint a run goes on from, and whether it is one of this run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_core.errors import TrainingError, explain
from trainer.checkpoints import last_checkpoint, read_checkpoint
from trainer.config import TrainConfig
from trainer.data.examples import Dataset
from trainer.defaults import Choice

_MAY_DIFFER = {
    "resume",
    "report_to",
    "checkpoint_steps",
    "checkpoint_seconds",
    "prefix_cache_mb",
    "output",
    "report_dir",
    "runs_file",
    "description",
    "licence",
}


@dataclass(frozen=True)
class Resumed:
    """A run to go on with."""

    checkpoint: Path
    config: TrainConfig
    """All of its settings, the chosen ones too."""
    choices: list[Choice]
    data: Mapping[str, str]
    """SHA-256 by split."""


def run_of(
    given: Mapping[str, Any],
    config: TrainConfig,
    choices: list[Choice],
    datasets: Mapping[str, Dataset],
) -> dict[str, Any]:
    """What a checkpoint says of its run, as JSON values."""
    return {
        "given": dict(given),
        "config": config.model_dump(mode="json"),
        "choices": [[choice.setting, str(choice.value), choice.reason] for choice in choices],
        "data": {split: dataset.sha256 for split, dataset in datasets.items()},
    }


def find_resumed(config: TrainConfig) -> Resumed | None:
    """The last checkpoint of the run that ``config`` describes, if it is to be taken up.

    Raises :class:`TrainingError` for one that was made with other settings.
    """
    checkpoint = last_checkpoint(config.checkpoint_dir)
    if checkpoint is None or not config.resume:
        return None
    run = read_checkpoint(checkpoint)["run"]
    for name, value in as_json(config).items():
        before = run["given"].get(name, run["config"].get(name))
        if name not in _MAY_DIFFER and value != before:
            raise TrainingError(
                explain(
                    name,
                    value,
                    f"{before!r}, as in {checkpoint}. Without resume the run starts again",
                ),
                field=name,
            )
    kept = run["config"] | {name: getattr(config, name) for name in _MAY_DIFFER}
    choices = [Choice(*choice) for choice in run["choices"]]
    return Resumed(checkpoint, TrainConfig.model_validate(kept), choices, run["data"])


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The settings that were given, as JSON values."""
    document: dict[str, Any] = config.model_dump(mode="json", include=config.model_fields_set)
    return document


def check_same_data(resumed: Resumed, datasets: Mapping[str, Dataset]) -> None:
    """Raise :class:`TrainingError` if the rows are not those the checkpoint was trained on."""
    for split, dataset in datasets.items():
        if resumed.data.get(split) != dataset.sha256:
            raise TrainingError(
                f"{dataset.path}: has changed since {resumed.checkpoint} was written; without "
                "resume the run starts again"
            )

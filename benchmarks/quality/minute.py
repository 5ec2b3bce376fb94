"""How long the smallest LoReFT of each labelling task trains, with the machine to itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance
from benchmarks.quality.run import base_model, config_of
from benchmarks.quality.summary import without_folders
from benchmarks.quality.tasks import CAUSAL, DTYPES, TASKS, QualityTask
from reft_core.loading import LoadedModel, load_any
from trainer.compare.config import CompareConfig
from trainer.compare.task import fit_on, load_task, run_config

NAME = "train-minute"
LABELLING = tuple(task for task in TASKS.values() if task.group == "labels")

Document = Mapping[str, Any]


def measure_all(data: Path, out: Path, documents: Sequence[Document]) -> dict[str, Any]:
    """Train each task once, by the setting that validation chose in its document."""
    loaded = load_any(base_model(CAUSAL), dtype=DTYPES[CAUSAL])
    chosen = {doc["task"]: smallest(doc) for doc in documents if doc["group"] == "labels"}
    found = [
        _measure(task, chosen[task.name], data, out, loaded)
        for task in LABELLING
        if task.name in chosen
    ]
    return {"results": found, "provenance": without_folders(provenance())}


def smallest(document: Document) -> Document:
    """The LoReFT of fewest parameters in a task's document."""
    refts = [result for result in document["results"] if result["method"] == "loreft"]
    return min(refts, key=lambda result: int(result["parameters"]))


def sentence(document: Document) -> str:
    """What the page says of it."""
    times = ", ".join(
        f"{r['task']} {r['step_seconds']:.0f} s ({r['seconds']:.0f})" for r in document["results"]
    )
    threads = document["provenance"]["threads"]
    return (
        f"All steps of the smallest LoReFT on {threads} cores with nothing else running (and with "
        f"the validations between them): {times}."
    )


def _measure(
    task: QualityTask, result: Document, data: Path, out: Path, loaded: LoadedModel
) -> dict[str, Any]:
    section = CompareConfig(**task.parts[result["part"]])
    rows = load_task(
        config_of(task, data, out),
        loaded=loaded,
        train_rows=section.train_rows,
        valid_rows=section.valid_rows,
        steps=section.steps,
    )
    config = run_config(rows.config, result["setting"])
    model = rows.under(config).new_model()
    start = time.perf_counter()
    fit = fit_on(rows, config, model)
    seconds = time.perf_counter() - start
    return {
        "task": task.name,
        "setting": result["setting"],
        "parameters": sum(parameter.numel() for parameter in model.trainable()),
        "steps": fit.num_steps,
        "train_rows": len(rows.train.rows),
        "step_seconds": round(fit.seconds, 1),
        "step_cpu_seconds": round(fit.cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }

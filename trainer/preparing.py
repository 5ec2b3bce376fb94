"""From a config to rows of tokens, a base and no open settings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from reft_core.loading import LoadedModel, kind_of, load_any, model_kind
from trainer.batches import batches
from trainer.checkpoints import last_checkpoint
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.data.splits import Splits, load_splits
from trainer.defaults import (
    Choice,
    Chooser,
    choose_dtype,
    choose_evaluation,
    choose_from_data,
    choose_from_model,
    choose_steps,
)
from trainer.order import visits
from trainer.processes import device, summed, world
from trainer.progress import Progress
from trainer.resuming import as_json, check_same_data, find_resumed, run_of
from trainer.task import Task, task_for


@dataclass(frozen=True)
class Prepared:
    """All that a training needs."""

    config: TrainConfig
    """With every setting that was open chosen."""
    choices: tuple[Choice, ...]
    remarks: tuple[str, ...]
    """What a person should know of how the data were read."""
    loaded: LoadedModel
    datasets: Mapping[str, Dataset]
    task: Task
    checkpoint: Path | None
    """To go on from."""
    run: Mapping[str, object]
    """What new checkpoints are to say of the run."""


def prepare(config: TrainConfig, loaded: LoadedModel | None, progress: Progress) -> Prepared:
    """Read the rows, load the base unless it is ``loaded``, and choose what is open.

    Says on ``progress`` what it chose. Raises :class:`TrainingError` before the base is loaded
    when the data cannot be used.
    """
    given = as_json(config)
    remarks = []
    resumed = find_resumed(config)
    if resumed is not None:
        config = resumed.config
        remarks.append(f"going on from {resumed.checkpoint}")
    elif config.resume:
        remarks.append(f"no checkpoint in {config.checkpoint_dir}: starting at the beginning")
    elif found := last_checkpoint(config.checkpoint_dir):
        remarks.append(f"starting again; with resume the run would have gone on from {found}")
    splits = load_splits(config)
    if resumed is not None:
        check_same_data(resumed, splits.datasets)
    chooser, loaded = choose_base(config, splits, loaded, progress)
    task = task_for(chooser.config, loaded, splits.datasets)
    kind = task.kind
    choose_evaluation(chooser, task.rows, kind)
    choose_steps(
        chooser,
        len(task.rows["train"]),
        lambda steps: seconds_for(chooser.config, task.with_settings(chooser.config), steps),
        kind,
    )
    choices = resumed.choices if resumed else chooser.choices
    remarks += splits.remarks
    for line in (*remarks, *map(str, choices)):
        progress.say(line)
    return Prepared(
        chooser.config,
        tuple(choices),
        tuple(remarks),
        loaded,
        splits.datasets,
        task.with_settings(chooser.config),
        resumed.checkpoint if resumed else None,
        run_of(given, chooser.config, choices, splits.datasets),
    )


def choose_base(
    config: TrainConfig, splits: Splits, loaded: LoadedModel | None, progress: Progress
) -> tuple[Chooser, LoadedModel]:
    """The base, loaded unless it is ``loaded``, and what rows and base decide of the settings."""
    if loaded is None:
        kind = kind_of(config.model, field="model")
    else:
        kind = model_kind(loaded.model.config)
    chooser = choose_from_data(config, splits, kind)
    if loaded is None:
        if kind == "causal":
            choose_dtype(chooser)
        with progress.stage("loading the base model"):
            loaded = load_any(
                chooser.config.model,
                dtype=chooser.config.dtype,
                device=str(device()),
                field="model",
            )
    choose_from_model(chooser, loaded.description.num_layers, loaded.tokenizer, kind)
    return chooser, loaded


def seconds_for(config: TrainConfig, task: Task, steps: int) -> float:
    """How long so many steps would take here, from three on a model that is thrown away."""
    model: Any = task.new_model()
    model = model.to(device())
    size = max(1, config.batch_size // world()[1])
    train = task.rows["train"]
    chosen = [train[place] for place in islice(visits(task.order), 2 * size)]
    warm_up, timed = chosen[:size], chosen[size:]
    _seconds_of_step(model, task, warm_up)
    first = _seconds_of_step(model, task, timed)
    again = _seconds_of_step(model, task, timed)
    num_first = min(steps, -(-len(train) // config.batch_size))
    seconds = first * num_first + again * (steps - num_first)
    return summed([seconds])[0] / world()[1]


def _seconds_of_step(model: Any, task: Task, rows: Sequence[Any]) -> float:
    start = time.perf_counter()
    for batch in batches(rows, len(rows), task.collator, model.device):
        model(**batch)["loss"].backward()
        model.zero_grad()
    return time.perf_counter() - start

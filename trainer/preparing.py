"""From a config to rows of tokens, a base and no open settings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import set_seed

from reft_core.loading import LoadedModel, load_model
from trainer.batches import batches
from trainer.checkpoints import last_checkpoint
from trainer.collate import Collator
from trainer.config import TrainConfig
from trainer.data import Dataset, TokenisedExample, tokenise
from trainer.data.splits import load_splits
from trainer.defaults import (
    Choice,
    choose_dtype,
    choose_evaluation,
    choose_from_data,
    choose_from_model,
    choose_steps,
)
from trainer.order import visits
from trainer.prefix import PrefixStore
from trainer.processes import device, summed, world
from trainer.progress import Progress
from trainer.reft_model import ReftModel
from trainer.resuming import as_json, check_same_data, find_resumed, run_of

Rows = Mapping[str, Sequence[TokenisedExample]]


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
    rows: Rows
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
    chooser = choose_from_data(config, splits)
    if loaded is None:
        choose_dtype(chooser)
        with progress.stage("loading the base model"):
            loaded = load_model(
                chooser.config.model, dtype=chooser.config.dtype, device=str(device())
            )
    choose_from_model(chooser, loaded.description.num_layers, loaded.tokenizer)
    rows = _tokenise(chooser.config, loaded, splits.datasets)
    choose_evaluation(chooser, splits, rows)
    choose_steps(
        chooser, len(rows["train"]), lambda n: seconds_for(chooser.config, loaded, rows, n)
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
        rows,
        resumed.checkpoint if resumed else None,
        run_of(given, chooser.config, choices, splits.datasets),
    )


def new_model(config: TrainConfig, loaded: LoadedModel) -> ReftModel:
    """The base with untrained interventions, drawn from the seed."""
    set_seed(config.seed)
    return ReftModel(
        loaded.model,
        config.placement(loaded.description),
        num_units=config.rule.num_units,
        prefixes=PrefixStore(loaded.model, config.prefix_cache_mb * 2**20),
        virtual=config.virtual_tokens(loaded),
    )


def seconds_for(config: TrainConfig, loaded: LoadedModel, rows: Rows, steps: int) -> float:
    """How long so many steps would take here, from three on a model that is thrown away."""
    model = new_model(config, loaded).to(device())
    size = max(1, config.batch_size // world()[1])
    train = rows["train"]
    chosen = [train[place] for place in islice(visits(len(train), config.seed), 2 * size)]
    warm_up, timed = chosen[:size], chosen[size:]
    _seconds_of_step(model, config, warm_up)
    first = _seconds_of_step(model, config, timed)
    again = _seconds_of_step(model, config, timed)
    num_first = min(steps, -(-len(train) // config.batch_size))
    seconds = first * num_first + again * (steps - num_first)
    return summed([seconds])[0] / world()[1]


def _seconds_of_step(
    model: ReftModel, config: TrainConfig, rows: Sequence[TokenisedExample]
) -> float:
    start = time.perf_counter()
    for batch in batches(rows, len(rows), Collator(config.rule), model.device):
        model(**batch)["loss"].backward()
        model.zero_grad()
    return time.perf_counter() - start


def _tokenise(
    config: TrainConfig, loaded: LoadedModel, datasets: Mapping[str, Dataset]
) -> dict[str, list[TokenisedExample]]:
    """The rows by split, each of which fits the base's context behind the virtual tokens."""
    context = loaded.description.max_positions - config.num_virtual
    return {
        split: tokenise(
            dataset,
            loaded.tokenizer,
            config.rule,
            template=config.template,
            max_length=min(config.max_length or context, context),
        )
        for split, dataset in datasets.items()
    }

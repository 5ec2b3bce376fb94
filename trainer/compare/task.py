"""The task of a comparison or a sweep: base and rows, loaded once for all of their runs.

What chooses a setting gets a :class:`Task`, which holds no test rows and no way to them; only
:func:`load_test` reads that file.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from reft_core.classification import answer_tokens, label_tokens
from reft_core.errors import TrainingError
from reft_core.loading import LoadedModel, load_model
from trainer.config import TrainConfig
from trainer.data import Dataset, TokenisedExample, tokenise
from trainer.data.sources import find_splits
from trainer.data.splits import load_splits
from trainer.defaults import STEPS, choose_dtype, choose_from_data, choose_from_model
from trainer.prefix import PrefixStore
from trainer.sections import validated


@dataclass(frozen=True)
class Split:
    """Rows of one file, in text and in tokens."""

    dataset: Dataset
    rows: list[TokenisedExample]

    @property
    def references(self) -> list[str]:
        """The right answers."""
        return [example.completion for example in self.dataset.examples]


@dataclass(frozen=True)
class Task:
    """A frozen base with training and validation rows."""

    config: TrainConfig
    """Shared by every run, apart from what a run's own setting replaces."""
    loaded: LoadedModel
    train: Split
    valid: Split
    prefixes: PrefixStore = field(repr=False)
    """Keys and values that are the base's own, kept over runs."""

    @property
    def datasets(self) -> dict[str, Dataset]:
        """The rows in text by split, for an adapter's provenance."""
        return {"train": self.train.dataset, "valid": self.valid.dataset}

    @property
    def label_answers(self) -> dict[str, tuple[int, ...]]:
        """Each label's tokens that count for its likelihood; none for a free task."""
        labels = self.config.labels or ()
        return dict(zip(labels, label_tokens(self.loaded.tokenizer, labels), strict=True))

    @property
    def label_completions(self) -> dict[str, tuple[int, ...]]:
        """Each label's tokens as a row's whole completion; none for a free task."""
        tokenizer = self.loaded.tokenizer
        return {label: answer_tokens(tokenizer, label) for label in self.config.labels or ()}


def load_task(
    config: TrainConfig,
    *,
    loaded: LoadedModel | None = None,
    train_rows: int | None = None,
    valid_rows: int | None = None,
    steps: int | None = None,
    spare_tokens: int = 0,
) -> Task:
    """The base, unless ``loaded`` is given, and both splits, of which some rows may be drawn.

    What the config leaves open is chosen as ``reft train`` does; every training takes ``steps``
    if they are given. ``spare_tokens`` of the context are left for what a method puts before a
    prompt. Raises :class:`TrainingError`
    for data that cannot be used, before a base is loaded.
    """
    splits = load_splits(config, test=False)
    chooser = choose_from_data(config, splits)
    if loaded is None:
        choose_dtype(chooser)
        loaded = load_model(chooser.config.model, dtype=chooser.config.dtype)
    choose_from_model(chooser, loaded.description.num_layers, loaded.tokenizer)
    config = chooser.config
    if steps is not None or not config.sized:
        config = config.choosing(steps=steps or STEPS)
    train = draw(splits.datasets["train"], train_rows)
    valid = draw(splits.datasets["valid"], valid_rows)
    return Task(
        config,
        loaded,
        _split(config, loaded, train, spare_tokens),
        _split(config, loaded, valid, spare_tokens),
        PrefixStore(loaded.model, config.prefix_cache_mb * 2**20),
    )


def check_has_test(config: TrainConfig) -> None:
    """Raise :class:`TrainingError` now, rather than after the search, without a test split."""
    if config.test is None and (config.data is None or "test" not in find_splits(config.data)):
        raise _test_missing()


def load_test(task: Task, *, test_rows: int | None = None, spare_tokens: int = 0) -> Split:
    """The test split. Raises :class:`TrainingError` if it cannot be used or leaks."""
    datasets = load_splits(task.config).datasets
    if "test" not in datasets:
        raise _test_missing()
    test = draw(datasets["test"], test_rows)
    return _split(task.config, task.loaded, test, spare_tokens)


def draw(dataset: Dataset, count: int | None) -> Dataset:
    """``count`` rows of the file, the same whenever asked; all if it holds no more."""
    examples = dataset.examples
    if count is None or count >= len(examples):
        return dataset
    chosen = sorted(random.Random(0).sample(range(len(examples)), count))
    return replace(dataset, examples=tuple(examples[index] for index in chosen))


def run_config(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """``config`` with ``changes``, validated.

    Raises :class:`TrainingError` naming the setting that makes no sense.
    """
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return validated(TrainConfig, "settings", given | dict(changes))


def _split(config: TrainConfig, loaded: LoadedModel, dataset: Dataset, spare: int) -> Split:
    context = loaded.description.max_positions - spare
    rows = tokenise(
        dataset,
        loaded.tokenizer,
        config.rule,
        template=config.template,
        max_length=min(config.max_length or context, context),
    )
    return Split(dataset, rows)


def _test_missing() -> TrainingError:
    return TrainingError("test: missing; a comparison ends on rows nothing was chosen by")

"""The task of a comparison or a sweep: base and rows, loaded once for all of their runs.

What chooses a setting gets a :class:`Task`, which holds no test rows and no way to them; only
:func:`load_test` reads that file.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from reft_core.loading import LoadedModel, load_model
from trainer.config import TrainConfig
from trainer.data import Dataset, TokenisedExample, check_no_leak, load_dataset, tokenise
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
        """Each label's tokens as a whole answer, its end included; none for a free task."""
        tokenizer = self.loaded.tokenizer
        return {
            label: (
                *tokenizer(label, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            )
            for label in self.config.labels or ()
        }


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

    With ``steps`` every training takes that many; see :func:`for_steps`. ``spare_tokens`` of
    the context are left for what a method puts before a prompt. Raises :class:`TrainingError`
    for data that cannot be used, before a base is loaded.
    """
    train = draw(_read(config, "train"), train_rows)
    if steps is not None:
        config, train = for_steps(config, train, steps)
    valid = draw(_read(config, "valid"), valid_rows)
    check_no_leak(train, valid)
    loaded = loaded or load_model(config.model, dtype=config.dtype)
    return Task(
        config,
        loaded,
        _split(config, loaded, train, spare_tokens),
        _split(config, loaded, valid, spare_tokens),
        PrefixStore(loaded.model, config.prefix_cache_mb * 2**20),
    )


def load_test(task: Task, *, test_rows: int | None = None, spare_tokens: int = 0) -> Split:
    """The test split. Raises :class:`TrainingError` if it cannot be used or leaks."""
    assert task.config.test is not None
    test = draw(_read(task.config, "test"), test_rows)
    for earlier in task.datasets.values():
        check_no_leak(earlier, test)
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


def for_steps(config: TrainConfig, train: Dataset, steps: int) -> tuple[TrainConfig, Dataset]:
    """``config`` and the rows of ``train`` with which a training takes ``steps`` steps.

    Within one epoch, as many rows as that are drawn and seen once. Beyond, the steps fall into
    the fewest epochs of equal length, and are rounded up to a multiple of it.
    """
    longest = math.ceil(len(train.examples) / config.batch_size)
    epochs = math.ceil(steps / longest)
    rows = math.ceil(steps / epochs) * config.batch_size
    return run_config(config, {"epochs": epochs}), draw(train, rows)


def _read(config: TrainConfig, name: str) -> Dataset:
    return load_dataset(getattr(config, name), system=config.system, labels=config.labels)


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

"""The task of a comparison or a sweep: base and rows, loaded once for all of their runs.

What chooses a setting gets a :class:`Task`, which holds no test rows and no way to them; only
:func:`load_test` reads that file.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

import trainer.task
from reft_core.classification import answer_tokens, label_tokens
from reft_core.errors import TrainingError
from reft_core.loading import LoadedModel, ModelKind, model_kind
from trainer.causal import CausalTask
from trainer.compare.answers import References
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.data.sources import find_splits
from trainer.data.splits import load_splits
from trainer.defaults import STEPS
from trainer.fit import Epoch, FitResult, fit
from trainer.preparing import choose_base
from trainer.progress import SilentProgress
from trainer.sections import validated
from trainer.task import TrainedModel, task_for


@dataclass(frozen=True)
class Split:
    """Rows of one file, in text and in tokens."""

    dataset: Dataset
    rows: Sequence[Any]
    """As the kind of base reads them."""

    @property
    def references(self) -> list[References]:
        """The right answers to each row: its ``references``, or what it says is the completion."""
        return [
            tuple(map(str, example.kept.get("references", ()))) or (example.completion,)
            for example in self.dataset.examples
        ]


@dataclass(frozen=True)
class Task:
    """A frozen base with training and validation rows."""

    config: TrainConfig
    """Shared by every run, apart from what a run's own setting replaces."""
    loaded: LoadedModel
    train: Split
    valid: Split
    shared: trainer.task.Task = field(repr=False)
    """The training and validation rows under ``config``, as they are trained on."""
    features: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)
    """The frozen base's states that a head is trained on, by prompt; they fill as they are asked
    for, so that only a comparison's first head waits for the base."""

    def under(self, config: TrainConfig) -> trainer.task.Task:
        """One run's: the same rows under settings of its own."""
        return self.shared.with_settings(config)

    @property
    def kind(self) -> ModelKind:
        """What kind of base it is."""
        return self.shared.kind

    @property
    def datasets(self) -> dict[str, Dataset]:
        """The rows in text by split, for an adapter's provenance."""
        return {"train": self.train.dataset, "valid": self.valid.dataset}

    @property
    def facts(self) -> dict[str, Any]:
        """All of it that every result depends on, as JSON values."""
        ours = {"name", "description", "licence", "output", "report_dir", "train", "valid", "test"}
        return {
            "config": self.config.model_dump(mode="json", exclude=ours),
            "train_sha256": self.train.dataset.sha256,
            "train_rows": len(self.train.rows),
            "valid_sha256": self.valid.dataset.sha256,
            "valid_rows": len(self.valid.rows),
        }

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
    if they are given. ``spare_tokens`` of a causal model's context are left for what a method
    puts before a prompt. Raises :class:`TrainingError`
    for data that cannot be used, before a base is loaded.
    """
    splits = load_splits(config, test=False)
    chooser, loaded = choose_base(config, splits, loaded, SilentProgress())
    config = chooser.config
    if steps is not None or not config.sized:
        config = config.choosing(steps=steps or STEPS)
    drawn = {
        "train": draw(splits.datasets["train"], train_rows),
        "valid": draw(splits.datasets["valid"], valid_rows),
    }
    shared = _tokenised(config, loaded, drawn, spare_tokens)
    if isinstance(shared, CausalTask):
        shared = replace(shared, prefixes=shared.new_prefixes())
    train, valid = (Split(drawn[split], shared.rows[split]) for split in drawn)
    return Task(config, loaded, train, valid, shared)


def fit_on(
    task: Task,
    config: TrainConfig,
    model: TrainedModel,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> FitResult:
    """Train ``model`` on the task's rows as ``config`` says; see :func:`trainer.fit.fit`."""
    run = task.under(config)
    return fit(
        model,
        task.train.rows,
        task.valid.rows,
        config,
        run.collator,
        SilentProgress(),
        measure=partial(run.measure, model),
        order=run.order,
        on_epoch=on_epoch,
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
    drawn = {"train": task.train.dataset, "test": test}
    return Split(test, _tokenised(task.config, task.loaded, drawn, spare_tokens).rows["test"])


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


def _tokenised(
    config: TrainConfig, loaded: LoadedModel, datasets: Mapping[str, Dataset], spare: int
) -> trainer.task.Task:
    """The rows under ``config``; those of a causal model leave ``spare`` tokens of its context."""
    if model_kind(loaded.model.config) != "causal":
        return task_for(config, loaded, datasets)
    context = loaded.description.max_positions - spare
    shorter = config.choosing(max_length=min(config.max_length or context, context))
    return task_for(shorter, loaded, datasets).with_settings(config)


def _test_missing() -> TrainingError:
    return TrainingError("test: missing; a comparison ends on rows nothing was chosen by")

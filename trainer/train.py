"""One training run, from config to adapter file and report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from reft_core.adapter import Adapter, decode_adapter, encode_adapter, write_durably
from reft_core.environment import environment
from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel, ModelKind
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.defaults import Choice
from trainer.evaluation.splits import Evaluation
from trainer.export import build_spec, check_finite
from trainer.fit import FitResult, fit
from trainer.order import spread
from trainer.outcome import check_learnt
from trainer.preparing import prepare
from trainer.processes import leave
from trainer.progress import Progress, SilentProgress
from trainer.report import write_report
from trainer.report.prompt import drawn_prompt
from trainer.trackers import check_tracker


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    config: TrainConfig
    """With what was chosen for it."""
    choices: tuple[Choice, ...]
    remarks: tuple[str, ...]
    """What a person should know of how the data were read."""
    warning: str | None
    """What speaks against using the adapter."""
    command: str
    adapter: Adapter
    """Read back from the file at ``config.output``."""
    fit: FitResult
    datasets: Mapping[str, Dataset]
    evaluations: Mapping[str, Evaluation]
    """By split: valid, and test if there is one."""
    num_trainable: int
    num_base_parameters: int
    kind: ModelKind
    """Of the base."""
    prompt: Mapping[str, object]
    """A held-out prompt with its edited tokens; see :func:`trainer.report.prompt.drawn_prompt`."""
    environment: Mapping[str, str | int]
    """See :func:`reft_core.environment.environment`."""

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers stored in the adapter file, by name."""
        return dict(self.adapter.spec.training.metrics)

    @property
    def last_split(self) -> str:
        """The split whose figures count: test, or valid where there is no test."""
        return list(self.evaluations)[-1]

    @property
    def sample_metric(self) -> str:
        """The first metric of the answers, which judges single ones too."""
        return next(iter(self.evaluations[self.last_split].metrics))


def train(
    config: TrainConfig,
    *,
    loaded: LoadedModel | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> TrainResult:
    """Train an adapter; write its file to ``config.output`` and a report beside it.

    ``loaded`` is the base if the caller has it already; the run ends with an engine that
    takes it over. Settings that are not given are chosen (:mod:`trainer.defaults`). Raises
    :class:`TrainingError` before the base is loaded when the data cannot be used. Unless the
    whole run succeeds nothing is written but checkpoints, which go when it does.
    """
    progress = progress or SilentProgress()
    _check_writable(config.output)
    check_tracker(config)
    prepared = prepare(config, loaded, progress)
    config, loaded, datasets = prepared.config, prepared.loaded, prepared.datasets
    task = prepared.task
    model = task.new_model()

    result = fit(
        model,
        task.rows["train"],
        task.rows["valid"],
        config,
        task.collator,
        progress,
        measure=partial(task.measure, model),
        order=task.order,
        checkpoint=prepared.checkpoint,
        run=prepared.run,
    )
    if not leave():
        raise SystemExit(0)  # what follows is the main process's
    warning = check_learnt(result)
    parts = task.parts(model)
    check_finite(parts.edits, parts.prefix, parts.head)

    def as_file(metrics: Mapping[str, float]) -> bytes:
        spec = build_spec(config, loaded.description, datasets, result, metrics, command, parts)
        return encode_adapter(spec, parts.edits, parts.prefix, parts.head)

    held_out = {
        split: _limited(datasets[split], task.rows[split], config.eval_rows)
        for split in task.rows
        if split != "train"
    }
    metrics = {"valid_loss": result.best.valid_loss, "base_valid_loss": result.epochs[0].valid_loss}
    if "test" in held_out:
        metrics["test_loss"] = task.measure(model, held_out["test"][1]).loss
    metrics |= task.probe(model, held_out, progress)
    sample = task.prompt_of(list(held_out.values())[-1][1][0])
    prompt = drawn_prompt(sample, loaded.tokenizer, config.rule if parts.sites else None)
    evaluations = task.evaluate(decode_adapter(as_file(metrics)), held_out, progress)
    for split, evaluation in evaluations.items():
        metrics |= {f"{split}_{name}": value for name, value in evaluation.metrics.items()}
    data = as_file(metrics)
    finished = TrainResult(
        config=config,
        command=command,
        choices=prepared.choices,
        remarks=prepared.remarks,
        warning=warning,
        adapter=decode_adapter(data),
        fit=result,
        datasets=datasets,
        evaluations=evaluations,
        num_trainable=sum(p.numel() for p in model.trainable()),
        num_base_parameters=loaded.description.num_parameters,
        kind=task.kind,
        prompt=prompt,
        environment=environment(),
    )
    write_durably(config.output, data)
    write_report(finished)
    shutil.rmtree(config.checkpoint_dir, ignore_errors=True)
    return finished


def _check_writable(path: Path) -> None:
    """Raise :class:`TrainingError` now rather than after the training."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TrainingError(
            explain("output", str(path), "a file in a folder that can be written"), field="output"
        )


def _limited(
    dataset: Dataset, rows: Sequence[Any], limit: int | None
) -> tuple[Dataset, Sequence[Any]]:
    """At most ``limit`` examples, and the same ones as tokens."""
    examples = tuple(spread(dataset.examples, limit))
    return replace(dataset, examples=examples), spread(rows, limit)

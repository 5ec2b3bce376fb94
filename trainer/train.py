"""One training run, from config to adapter file and report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed

from reft_core.adapter import Adapter, decode_adapter, encode_adapter, write_durably
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.errors import TrainingError, explain
from reft_core.loading import LoadedModel, load_model
from trainer.collate import Collator
from trainer.config import TrainConfig
from trainer.data import Dataset, TokenisedExample, check_no_leak, load_dataset, tokenise
from trainer.evaluation.scoring import score
from trainer.evaluation.splits import Evaluation, evaluate, likeliest_labels
from trainer.export import build_spec, check_finite
from trainer.fit import FitResult, fit, mean_loss
from trainer.prefix import PrefixStore
from trainer.progress import Progress, SilentProgress
from trainer.reft_model import ReftModel
from trainer.report import write_report

_EXTRA_TOKENS = 8
"""Tokens an answer may be longer than the longest reference before it is cut."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    config: TrainConfig
    command: str
    adapter: Adapter
    """Read back from the file at ``config.output``."""
    fit: FitResult
    datasets: Mapping[str, Dataset]
    evaluations: Mapping[str, Evaluation]
    """By split: valid, and test if there is one."""
    num_trainable: int
    num_base_parameters: int

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers stored in the adapter file, by name."""
        return dict(self.adapter.spec.training.metrics)


def train(
    config: TrainConfig,
    *,
    loaded: LoadedModel | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> TrainResult:
    """Train an adapter; write its file to ``config.output`` and a report beside it.

    ``loaded`` is the base if the caller has it already; the run ends with an engine that
    takes it over. Raises :class:`TrainingError` before the base is loaded when the data
    cannot be used. Nothing is written unless the whole run succeeds.
    """
    progress = progress or SilentProgress()
    _check_writable(config.output)
    datasets = _load_datasets(config)
    if loaded is None:
        with progress.stage("loading the base model"):
            loaded = load_model(config.model, dtype=config.dtype)
    rows = _tokenise(config, loaded, datasets)
    model = _new_model(config, loaded)
    collator = Collator(config.rule)

    result = fit(model, rows["train"], rows["valid"], config, collator, progress)
    edits, prefix = model.to_edits(), model.to_prefix()
    check_finite(edits, prefix)

    def as_file(metrics: Mapping[str, float]) -> bytes:
        virtual = None if model.virtual is None else model.virtual.spec()
        spec = build_spec(config, loaded.description, datasets, result, metrics, command, virtual)
        return encode_adapter(spec, edits, prefix)

    held_out = [split for split in rows if split != "train"]
    metrics = {"valid_loss": result.best.valid_loss, "base_valid_loss": result.epochs[0].valid_loss}
    if "test" in rows:
        metrics["test_loss"] = mean_loss(model, rows["test"], config, collator)
    if config.labels:
        split = held_out[-1]
        metrics |= _label_choice(config, model, loaded, datasets[split], rows[split], progress)

    evaluations = _evaluate(
        config,
        loaded,
        decode_adapter(as_file(metrics)),
        {split: (datasets[split], rows[split]) for split in held_out},
        progress,
    )
    for split, evaluation in evaluations.items():
        metrics |= {f"{split}_{name}": value for name, value in evaluation.metrics.items()}
    data = as_file(metrics)
    finished = TrainResult(
        config=config,
        command=command,
        adapter=decode_adapter(data),
        fit=result,
        datasets=datasets,
        evaluations=evaluations,
        num_trainable=sum(p.numel() for p in model.trainable()),
        num_base_parameters=loaded.description.num_parameters,
    )
    write_durably(config.output, data)
    write_report(finished)
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


def _load_datasets(config: TrainConfig) -> dict[str, Dataset]:
    """The files by split, checked against each other."""
    paths = {"train": config.train, "valid": config.valid, "test": config.test}
    datasets = {
        split: load_dataset(path, system=config.system, labels=config.labels)
        for split, path in paths.items()
        if path is not None
    }
    splits = list(datasets.values())
    for index, held_out in enumerate(splits):
        for earlier in splits[:index]:
            check_no_leak(earlier, held_out)
    return datasets


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


def _new_model(config: TrainConfig, loaded: LoadedModel) -> ReftModel:
    """The base with untrained interventions, drawn from the seed."""
    set_seed(config.seed)
    return ReftModel(
        loaded.model,
        config.placement(loaded.description),
        num_units=config.rule.num_units,
        prefixes=PrefixStore(loaded.model, config.prefix_cache_mb * 2**20),
        virtual=config.virtual_tokens(loaded),
    )


def _label_choice(
    config: TrainConfig,
    model: ReftModel,
    loaded: LoadedModel,
    dataset: Dataset,
    rows: Sequence[TokenisedExample],
    progress: Progress,
) -> dict[str, float]:
    """Accuracy of adapter and base when they must choose among the labels."""
    assert config.labels is not None
    references = [example.completion for example in dataset.examples]
    found = {}
    for prefix, edited in (("", True), ("base_", False)):
        with progress.stage(f"likelihoods, {'adapter' if edited else 'base'}"):
            chosen = likeliest_labels(
                model,
                loaded.tokenizer,
                rows,
                config.labels,
                Collator(config.rule),
                batch_size=config.batch_size,
                edited=edited,
            )
        found[f"{prefix}label_choice"] = score("exact_match", chosen, references)
    return found


def _evaluate(
    config: TrainConfig,
    loaded: LoadedModel,
    adapter: Adapter,
    splits: Mapping[str, tuple[Dataset, Sequence[TokenisedExample]]],
    progress: Progress,
) -> dict[str, Evaluation]:
    """Each split's answers by base and adapter, from an engine of our own."""
    all_rows = [row for _, rows in splits.values() for row in rows]
    longest_answer = max(len(row.completion) for row in all_rows)
    max_tokens = config.max_new_tokens or longest_answer + _EXTRA_TOKENS
    longest_prompt = max(len(row.prompt) for row in all_rows)
    longest_prompt += config.num_virtual
    context = loaded.description.max_positions
    max_tokens = min(max_tokens, context - longest_prompt)
    engine = EmbeddedEngine(loaded, EngineConfig(max_model_len=longest_prompt + max_tokens))
    engine.start()
    try:
        engine.load_adapter(adapter)
        found = {}
        for split, (dataset, rows) in splits.items():
            with progress.stage(f"answers, {split}"):
                found[split] = evaluate(
                    engine,
                    loaded.tokenizer,
                    dataset,
                    rows,
                    adapter=adapter.digest,
                    metrics=config.metrics,
                    labels=config.labels,
                    max_tokens=max_tokens,
                )
        return found
    finally:
        engine.stop()

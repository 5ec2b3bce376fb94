"""A trained model to an adapter file, with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import torch
import transformers

import reft_core
from reft_core.adapter import EditKey, Head, Prefix
from reft_core.edits import Edit
from reft_core.sites import ModelDescription
from reft_core.spec import AdapterSpec, TrainingSpec
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.fit import FitResult, diverged
from trainer.paths import is_local
from trainer.task import TrainedParts

TOOL = (
    f"reft-serve {reft_core.__version__}, torch {torch.__version__}, "
    f"transformers {transformers.__version__}"
)
_MAX_TEXT = 256  # of one value in the spec's training section
_MAX_COMMAND = 8192


def build_spec(
    config: TrainConfig,
    model: ModelDescription,
    datasets: Mapping[str, Dataset],
    result: FitResult,
    metrics: Mapping[str, float],
    command: str,
    parts: TrainedParts,
) -> AdapterSpec:
    """The complete spec of what ``config`` trained on ``model``."""
    data: dict[str, str | int] = {}
    for split, dataset in datasets.items():
        data[f"{split}_file"] = dataset.path.name[:_MAX_TEXT]
        data[f"{split}_sha256"] = dataset.sha256
        data[f"{split}_rows"] = len(dataset.examples)
        if split != "train" and config.eval_rows and config.eval_rows < len(dataset.examples):
            data[f"{split}_rows_answered"] = config.eval_rows
    if config.data is not None and not is_local(config.data):
        data["dataset"] = config.data.partition(":")[0][:_MAX_TEXT]  # a hub's
    return AdapterSpec(
        name=config.name,
        description=config.description,
        licence=config.licence,
        base=model.to_base_spec(),
        method=config.method,
        positions=config.position_spec,
        sites=dict(parts.sites),
        prefix=parts.prefix_spec,
        head=parts.head_spec,
        subspaces=config.subspaces,
        task=parts.task,
        template=parts.template,
        training=TrainingSpec(
            tool=TOOL,
            command=command[:_MAX_COMMAND],
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=config.seed,
            data=data,
            hyperparameters=_hyperparameters(config, result),
            metrics=dict(metrics),
        ),
    )


def check_finite(
    edits: Mapping[EditKey, Edit], prefix: Prefix | None = None, head: Head | None = None
) -> None:
    """Raise :class:`TrainingError` if a trained tensor holds NaN or infinity."""
    trained = {
        f"{part} of layer {key.layer}, {key.site}": tensor
        for key, edit in edits.items()
        for part, tensor in edit.parts()
    }
    trained |= {} if prefix is None else prefix.tensors()
    trained |= {} if head is None else head.tensors()
    for name, tensor in trained.items():
        if not torch.isfinite(tensor).all():
            raise diverged(f"{name} ended with NaN or infinity")


def _hyperparameters(config: TrainConfig, result: FitResult) -> dict[str, str | int | float | bool]:
    """What a reader needs to train the same again; the spec holds the rest."""
    found: dict[str, str | int | float | bool] = {
        "optimizer": "adamw",
        "base_dtype": config.dtype,
        "best_epoch": result.best.number,
        "best_step": result.best.step,
        "steps": result.num_steps,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler": config.lr_scheduler,
        "warmup_ratio": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
    }
    if config.steps is None:
        found["epochs"] = config.epochs
    if config.fixed_scale is not None:
        found["scale"] = config.fixed_scale
    if config.prefix_bottleneck is not None:
        found["prefix_bottleneck"] = config.prefix_bottleneck
    if config.system is not None:
        found["system"] = config.system[:_MAX_TEXT]
    return found

"""Everything a report says, as plain JSON values; what draws it reads nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.evaluation.scoring import METRICS, answered
from trainer.paths import shown_config, shown_path

if TYPE_CHECKING:
    from trainer.evaluation.splits import Evaluation, Sample
    from trainer.train import TrainResult

_DIGITS = 5
"""Of losses that are drawn, and of single answers' scores."""


def to_document(result: TrainResult) -> dict[str, Any]:
    """Everything the report says."""
    config, spec, fit = result.config, result.adapter.spec, result.fit
    chosen = {choice.setting for choice in result.choices}
    return {
        "name": config.name,
        "description": config.description,
        "command": result.command,
        "created_at": spec.training.created_at,
        "adapter": {
            "path": shown_path(config.output),
            "digest": result.adapter.digest,
            "num_bytes": result.adapter.num_bytes,
            "method": spec.method,
            "sites": {
                name: {"layers": list(site.layers), "rank": site.rank}
                for name, site in spec.sites.items()
            },
            "prefix": None if spec.prefix is None else spec.prefix.model_dump(mode="json"),
            "head": None if spec.head is None else spec.head.model_dump(mode="json"),
        },
        "base": {
            "kind": result.kind,
            "num_parameters": result.num_base_parameters,
            **spec.base.model_dump(mode="json"),
        },
        "config": shown_config(config),
        "given": sorted(config.model_fields_set - chosen),
        "choices": {c.setting: {"value": str(c.value), "why": c.reason} for c in result.choices},
        "remarks": list(result.remarks),
        "warning": result.warning,
        "num_trainable": result.num_trainable,
        "trainable_share": result.num_trainable / result.num_base_parameters,
        "data": dict(spec.training.data),
        "num_duplicates": {s: d.num_duplicates for s, d in result.datasets.items()},
        "train_losses": [[step, round(loss, _DIGITS)] for step, loss in fit.train_losses],
        "epochs": [vars(epoch) for epoch in fit.epochs],
        "best_epoch": fit.best.number,
        "num_steps": fit.num_steps,
        "training_seconds": round(fit.seconds, 3),
        "training_cpu_seconds": round(fit.cpu_seconds, 3),
        "metrics": result.metrics,
        "sample_metric": result.sample_metric,
        "confusion": {s: e.confusion.counts for s, e in result.evaluations.items() if e.confusion},
        "samples": {
            split: _samples(evaluation, result.sample_metric)
            for split, evaluation in result.evaluations.items()
        },
        "prompt": result.prompt,
        "environment": result.environment,
    }


def _samples(evaluation: Evaluation, metric: str) -> list[dict[str, Any]]:
    """Every row with its answers, and how the metric that scores single rows finds them."""
    base, adapter = (
        _row_scores(metric, evaluation.samples, [getattr(s, who) for s in evaluation.samples])
        for who in ("base", "adapter")
    )
    return [
        vars(sample) | {"base_score": ours, "adapter_score": theirs}
        for sample, ours, theirs in zip(evaluation.samples, base, adapter, strict=True)
    ]


def _row_scores(
    metric: str, samples: tuple[Sample, ...], answers: list[str]
) -> list[float] | list[None]:
    """A score for each row; None for all where the metric is of whole sets alone."""
    rows = answered(answers, [sample.reference for sample in samples])
    scores = METRICS[metric].row_scores(rows)
    return [None] * len(rows) if scores is None else [round(each, _DIGITS) for each in scores]

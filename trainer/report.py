"""The report of a run: one Markdown page for people, one JSON document for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_core.adapter import write_durably
from trainer.config import PATH_FIELDS, TrainConfig
from trainer.evaluation.scoring import OTHER, Confusion

if TYPE_CHECKING:
    from trainer.evaluation.splits import Evaluation
    from trainer.fit import FitResult
    from trainer.train import TrainResult

MAX_SAMPLES = 8
_BARS = "▁▂▃▄▅▆▇█"


def write_report(result: TrainResult) -> None:
    """Write ``report.md`` and ``report.json`` into the run's report folder."""
    folder = result.config.report_dir
    write_durably(folder / "report.md", render_markdown(result).encode())
    document = json.dumps(to_document(result), indent=1, ensure_ascii=False)
    write_durably(folder / "report.json", document.encode())


def to_document(result: TrainResult) -> dict[str, object]:
    """Everything the report says, as plain JSON values."""
    return {
        "name": result.config.name,
        "command": result.command,
        "adapter": {
            "path": _shown(result.config.output),
            "digest": result.adapter.digest,
            "num_bytes": result.adapter.num_bytes,
        },
        "config": _shown_config(result.config),
        "choices": {c.setting: {"value": str(c.value), "why": c.reason} for c in result.choices},
        "remarks": list(result.remarks),
        "warning": result.warning,
        "num_trainable": result.num_trainable,
        "trainable_share": result.num_trainable / result.num_base_parameters,
        "data": dict(result.adapter.spec.training.data),
        "num_duplicates": {s: d.num_duplicates for s, d in result.datasets.items()},
        "epochs": [vars(epoch) for epoch in result.fit.epochs],
        "best_epoch": result.fit.best.number,
        "num_steps": result.fit.num_steps,
        "training_seconds": round(result.fit.seconds, 3),
        "metrics": result.metrics,
        "confusion": {s: e.confusion.counts for s, e in result.evaluations.items() if e.confusion},
        "samples": {
            split: [vars(sample) for sample in evaluation.samples]
            for split, evaluation in result.evaluations.items()
        },
    }


def _shown(path: Path) -> str:
    """``path`` from where the command was given, if it lies there; a report is made to travel."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _shown_config(config: TrainConfig) -> dict[str, object]:
    """The config as JSON values, with paths as :func:`_shown` gives them."""
    document: dict[str, object] = config.model_dump(mode="json")
    for field in PATH_FIELDS:
        if (path := getattr(config, field)) is not None:
            document[field] = _shown(path)
    return document


def render_markdown(result: TrainResult) -> str:
    """The report as Markdown."""
    sections = [
        f"# {result.config.name}",
        result.config.description,
        f"**Warning:** {_cell(result.warning, 400)}" if result.warning else "",
        _facts_table(result),
        *_choices(result),
        "## Data",
        _table(
            ("split", "rows", "repeated", "SHA-256"),
            [
                (split, str(len(data.examples)), str(data.num_duplicates), f"`{data.sha256}`")
                for split, data in result.datasets.items()
            ],
        ),
        "\n".join(f"- {_cell(remark, 400)}" for remark in result.remarks),
        "## Loss per completion token",
        _losses(result.fit),
        "## Metrics",
        _table(("metric", "base", "adapter"), metric_rows(result.metrics)),
    ]
    for split, evaluation in result.evaluations.items():
        if evaluation.confusion:
            sections += [f"## Answers by label, {split}", _confusion_table(evaluation.confusion)]
    split, evaluation = list(result.evaluations.items())[-1]
    sections += [f"## Sample answers, {split}", _samples_table(evaluation)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _facts_table(result: TrainResult) -> str:
    """What was trained, on what, and how to do it again."""
    config, adapter, fit = result.config, result.adapter, result.fit
    base = adapter.spec.base
    step_ms = 1000 * fit.seconds / fit.num_steps
    share = 100 * result.num_trainable / result.num_base_parameters
    return _table(
        ("", ""),
        [
            ("file", f"`{_shown(config.output)}`"),
            ("digest", f"`{adapter.digest}`"),
            ("size", f"{adapter.num_bytes:,} bytes"),
            ("base", f"{base.name} ({config.dtype})"),
            ("method", _method(config)),
            *(
                (f"layers of {site}", ", ".join(map(str, spec.layers)))
                for site, spec in adapter.spec.sites.items()
            ),
            ("positions", f"{config.rule}, {'tied' if config.tied else 'untied'}"),
            ("trained parameters", f"{result.num_trainable:,} ({share:.4f} % of the base)"),
            ("steps", f"{fit.num_steps} in {fit.seconds:.1f} s ({step_ms:.0f} ms each)"),
            ("learning rate", f"{config.learning_rate:g}, batches of {config.batch_size}"),
            ("seed", str(config.seed)),
            ("made by", adapter.spec.training.tool),
            ("command", f"`{result.command}`"),
        ],
    )


def _choices(result: TrainResult) -> list[str]:
    """The settings that nobody gave, what they became, and why."""
    if not result.choices:
        return []
    rows = [(c.setting, f"`{_cell(str(c.value))}`", _cell(c.reason)) for c in result.choices]
    return ["## Chosen settings", _table(("setting", "value", "why"), rows)]


def _losses(fit: FitResult) -> str:
    """The losses of every epoch, and which epoch was kept."""
    table = _table(
        ("epoch", "step", "training", "validation"),
        [
            (
                str(epoch.number),
                str(epoch.step),
                "" if epoch.train_loss is None else f"{epoch.train_loss:.4f}",
                f"{epoch.valid_loss:.4f}",
            )
            for epoch in fit.epochs
        ],
    )
    return (
        f"Validation: `{sparkline([epoch.valid_loss for epoch in fit.epochs])}`, lowest in epoch "
        f"{fit.best.number}, which is the one kept. Epoch 0 is the untrained model.\n\n{table}"
    )


def _samples_table(evaluation: Evaluation) -> str:
    """Some questions with the answers of base and adapter."""
    return _table(
        ("asked", "expected", "base", "adapter"),
        [
            (_cell(s.question), _cell(s.reference), _cell(s.base), _cell(s.adapter))
            for s in evaluation.samples[:MAX_SAMPLES]
        ],
    )


def metric_rows(metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Name, the base's value, the adapter's value, of each metric; blank where unmeasured.

    The base's is stored under the same name with ``base_`` before it (after the split).
    """
    rows = []
    for name, value in metrics.items():
        if "base_" in name:
            continue
        split, _, rest = name.partition("_")
        base = metrics.get(f"{split}_base_{rest}", metrics.get(f"base_{name}"))
        rows.append((name, "" if base is None else f"{base:.4f}", f"{value:.4f}"))
    return rows


def sparkline(values: list[float]) -> str:
    """One block character a value, scaled between the lowest and the highest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)


def _confusion_table(matrix: Confusion) -> str:
    rows = []
    for label in matrix.labels:
        accuracy = matrix.accuracy(label)
        shown = "" if accuracy is None else f"{accuracy:.2f}"
        counts = [str(count) for count in matrix.counts[label].values()]
        rows.append((f"**{_cell(label)}**", *counts, shown))
    return _table(("expected \\ answered", *map(_cell, matrix.labels), OTHER, "accuracy"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str, limit: int = 160) -> str:
    """Text that fits a Markdown table cell."""
    flat = " ".join(text.split())
    short = flat if len(flat) <= limit else f"{flat[: limit - 1]}…"
    return short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _method(config: TrainConfig) -> str:
    """The method with its sizes."""
    sizes = []
    if config.intervention is not None:
        sizes.append(f"rank {config.rank}")
    if config.num_virtual:
        sizes.append(f"{config.num_virtual} virtual tokens")
    return ", ".join([config.method, *sizes])

"""A comparison's table as Markdown, CSV and LaTeX. Pure functions of its rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from trainer.compare.run import Comparison
from trainer.compare.serving import SCOPES
from trainer.compare.table import Row
from trainer.evaluation.scoring import Estimate

_NONE = "–"


def to_markdown(comparison: Comparison, rows: Sequence[Row], command: str) -> str:
    """The report: the table, then what each of its columns means."""
    header = ["method", "setting", "parameters", "% of base", f"{comparison.metric.name} (95 %)"]
    header += [f"vs {comparison.config.reference}"] if comparison.config.reference else []
    header += ["training, s", "file, bytes", "serving"]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for row in rows:
        lines.append(f"| {' | '.join(_cells(comparison, row))} |")
    failures = [f"- {row.label}: {row.error}" for row in rows if row.error]
    parts = [
        f"# Comparison on {comparison.task['model']}",
        _about(comparison),
        "\n".join(lines),
        "![quality against parameters](quality.png)",
        *(["Runs that failed:\n\n" + "\n".join(failures)] if failures else []),
        _legend(rows),
        f"Made by `{command}`.\n" if command else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _about(comparison: Comparison) -> str:
    config, task = comparison.config, comparison.task
    budget = (
        f"{config.steps} steps" if config.steps else f"{task['config']['epochs']} epochs"
    ) + f" of {task['config']['batch_size']} rows"
    seeds = ", ".join(map(str, config.seeds))
    return (
        f"{task['train_rows']} training rows, {task['valid_rows']} validation rows, "
        f"{len(comparison.references)} test rows. Every training: {budget}, AdamW, the same "
        f"schedule, the epoch of lowest validation loss kept. Search: {config.search} settings a "
        f"method, chosen on the validation rows with seed {config.seeds[0]}. Tested once with "
        f"seeds {seeds}."
    )


def _legend(rows: Sequence[Row]) -> str:
    used = {row.serving_scope for row in rows if row.quality is not None}
    scopes = "\n".join(f"- {name}: {text}." for name, text in SCOPES.items() if name in used)
    return (
        "The interval is half the width of a two-level bootstrap over seeds and test rows. "
        "Parameters are those trained, bytes those of the saved tensors' file. Training seconds "
        "are spent in steps alone, on this machine. Serving names the forwards a method takes "
        "part in, and the operations it adds to a mean request, counted and not measured:\n\n"
        f"{scopes}"
    )


def _cells(comparison: Comparison, row: Row) -> list[str]:
    with_reference = comparison.config.reference is not None
    if row.quality is None:
        return [row.label, *[_NONE] * (8 if with_reference else 7)]
    factor = 100 if comparison.metric.percent else 1
    cells = [
        row.label,
        row.setting or _NONE,
        f"{row.num_parameters:,}",
        f"{row.percent_of_base:.3g}",
        shown(row.quality, factor),
    ]
    if with_reference:
        cells.append(shown(row.difference, factor, signed=True) if row.difference else _NONE)
    return [
        *cells,
        f"{row.training_seconds:.0f}",
        f"{row.file_bytes:,}",
        f"{row.serving_scope}, {row.serving_extra_percent:+.3g} %",
    ]


def shown(estimate: Estimate, factor: float, *, signed: bool = False) -> str:
    """``94.2 ± 1.6``: a value and half the width of its interval, times ``factor``."""
    digits = 1 if factor == 100 else 3
    half = factor * (estimate.high - estimate.low) / 2
    value = factor * estimate.value
    return f"{value:{'+' if signed else ''}.{digits}f} ± {half:.{digits}f}"


_CSV = (
    "method",
    "setting",
    "num_seeds",
    "value",
    "low",
    "high",
    "by_seed",
    "difference",
    "difference_low",
    "difference_high",
    "num_parameters",
    "percent_of_base",
    "training_seconds",
    "file_bytes",
    "serving_scope",
    "serving_extra_percent",
    "error",
)


def to_csv(rows: Sequence[Row]) -> str:
    """All numbers unrounded, the metric as it is and not in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for row in rows:
        quality, other = row.quality, row.difference
        writer.writerow(
            [
                row.method,
                row.setting,
                row.num_seeds,
                *((quality.value, quality.low, quality.high) if quality else ("", "", "")),
                " ".join(map(str, row.by_seed)),
                *((other.value, other.low, other.high) if other else ("", "", "")),
                row.num_parameters,
                row.percent_of_base,
                row.training_seconds,
                row.file_bytes,
                row.serving_scope,
                row.serving_extra_percent,
                row.error,
            ]
        )
    return text.getvalue()


def to_latex(comparison: Comparison, rows: Sequence[Row]) -> str:
    """A table for booktabs: method, parameters, share, metric, training, serving."""
    factor = 100 if comparison.metric.percent else 1
    lines = [
        r"\begin{tabular}{lrrrrl}",
        r"\toprule",
        rf"Method & Parameters & \% of base & {_tex(comparison.metric.name)} & s & Serving \\",
        r"\midrule",
    ]
    for row in rows:
        cells = [_tex(row.label), *["--"] * 5]
        if row.quality is not None:
            cells[1:] = [
                f"{row.num_parameters:,}",
                f"{row.percent_of_base:.3g}",
                f"${shown(row.quality, factor).replace('±', chr(92) + 'pm')}$",
                f"{row.training_seconds:.0f}",
                _tex(row.serving_scope),
            ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex(text: str) -> str:
    for character in ("&", "%", "_", "#"):
        text = text.replace(character, "\\" + character)
    return text

"""A comparison's table as Markdown, CSV and LaTeX. Pure functions of its rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from trainer.compare.contenders import CONTENDERS
from trainer.compare.run import Comparison
from trainer.compare.serving import SCOPES
from trainer.compare.table import Row, Spread
from trainer.evaluation.scoring import Estimate

_NONE = "–"


def to_markdown(comparison: Comparison, rows: Sequence[Row], command: str) -> str:
    """The report: the table, then what each of its columns means."""
    header = ["method", "setting", "tried", "seeds", "parameters", "% of base"]
    header += [f"{comparison.metric.name} (95 %)"]
    header += [f"vs {comparison.config.reference}"] if comparison.config.reference else []
    header += [f"training, {comparison.clock} s", "file, bytes", "serving"]
    header += ["first token, × base", "tokens/s, × base"] if comparison.latency else []
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for row in rows:
        lines.append(f"| {' | '.join(_cells(comparison, row))} |")
    failures = [f"- {row.label}: {row.error}" for row in rows if row.error]
    left_out = [f"- {CONTENDERS[name].label}: {why}" for name, why in comparison.left_out.items()]
    parts = [
        f"# Comparison on {comparison.task['model']}",
        _about(comparison),
        "\n".join(lines),
        "![quality against parameters](quality.png)",
        *(["Runs that failed:\n\n" + "\n".join(failures)] if failures else []),
        *(["Left out:\n\n" + "\n".join(left_out)] if left_out else []),
        _legend(comparison, rows),
        f"Made by `{command}`.\n" if command else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _about(comparison: Comparison) -> str:
    config, task = comparison.config, comparison.task
    shared = task["config"]  # its steps are the comparison's, if that has any
    length = f"{shared['steps']} steps" if shared["steps"] else f"{shared['epochs']} epochs"
    budget = f"{length} of {shared['batch_size']} rows"
    seeds = ", ".join(map(str, config.seeds))
    return (
        f"{task['train_rows']} training rows, {task['valid_rows']} validation rows, "
        f"{len(comparison.references)} test rows. Every training: {budget}, AdamW, the same "
        f"schedule, the epoch of {_kept_epoch(comparison)} kept. Search: up to {config.search} "
        f"settings a method, chosen on the validation rows with seed {config.seeds[0]}. Tested "
        f"once with seeds {seeds}."
    )


def _kept_epoch(comparison: Comparison) -> str:
    if comparison.kind == "encoder":
        return f"best validation {comparison.metric.name}"
    return "lowest validation loss"


def seconds(comparison: Comparison, row: Row) -> float:
    """Of training, by the clock that is shown."""
    return row.training_cpu_seconds if comparison.clock == "CPU" else row.training_seconds


_CLOCKS = {
    "CPU": "CPU seconds of all threads in training steps alone, so that neither a pause nor what "
    "else the machine did adds to them; those on the wall are in table.csv",
    "wall": "seconds on the wall in training steps alone, on this machine",
}


def _legend(comparison: Comparison, rows: Sequence[Row]) -> str:
    used = {row.serving_scope for row in rows if row.quality is not None}
    scopes = "\n".join(f"- {name}: {text}." for name, text in SCOPES.items() if name in used)
    return (
        "Tried are the settings of the method's own search, seeds those whose run did not fail. "
        "The interval is half the width of a two-level bootstrap over seeds and test rows. "
        f"Parameters are those trained{_head_too(comparison)}, bytes those of the saved tensors' "
        f"file. Training times are {_CLOCKS[comparison.clock]}. Serving names the forwards a "
        "method takes part in, and the operations it adds to a mean request, counted and not "
        f"measured:\n\n{scopes}{_latency_told(comparison)}"
    )


def _latency_told(comparison: Comparison) -> str:
    if not comparison.latency:
        return ""
    return (
        f"\n\nMeasured: {comparison.latency['requests']} prompts, each asked of the base and of "
        "every method's adapter of the first seed in turn, one request at a time, on our engine; "
        f"time to the first token and tokens a second of {comparison.latency['tokens']} tokens, "
        "over the base's for the same prompt: median (quartiles)."
    )


def _head_too(comparison: Comparison) -> str:
    return ", the head's among them" if comparison.kind == "encoder" else ""


def _cells(comparison: Comparison, row: Row) -> list[str]:
    with_reference = comparison.config.reference is not None
    first = [row.label, row.setting or _NONE, str(row.num_tried), str(row.num_seeds)]
    if row.quality is None:
        return [*first, *[_NONE] * (6 + with_reference + 2 * bool(comparison.latency))]
    factor = 100 if comparison.metric.percent else 1
    cells = [
        *first,
        f"{row.num_parameters:,}",
        f"{row.percent_of_base:.3g}",
        shown(row.quality, factor),
    ]
    if with_reference:
        cells.append(shown(row.difference, factor, signed=True) if row.difference else _NONE)
    return [
        *cells,
        f"{seconds(comparison, row):.0f}",
        f"{row.file_bytes:,}",
        f"{row.serving_scope}, {row.serving_extra_percent:+.3g} %",
        *([_ratio(row, row.first_token), _ratio(row, row.speed)] if comparison.latency else []),
    ]


def _ratio(row: Row, spread: Spread) -> str:
    """``1.02 (0.99–1.05)``: the median and the quartiles."""
    if not spread:
        return row.serving_scope if row.serving_scope in ("none", "own weights") else _NONE
    return f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"


def shown(estimate: Estimate, factor: float, *, signed: bool = False) -> str:
    """``94.2 ± 1.6``: a value and half the width of its interval, times ``factor``."""
    digits = 1 if factor == 100 else 3
    half = factor * (estimate.high - estimate.low) / 2
    value = factor * estimate.value
    return f"{value:{'+' if signed else ''}.{digits}f} ± {half:.{digits}f}"


_QUARTILES = ("median", "low", "high")
_CSV = (
    "method",
    "setting",
    "num_tried",
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
    "training_cpu_seconds",
    "file_bytes",
    "serving_scope",
    "serving_extra_percent",
    "first_token",
    "first_token_low",
    "first_token_high",
    "speed",
    "speed_low",
    "speed_high",
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
                row.num_tried,
                row.num_seeds,
                *((quality.value, quality.low, quality.high) if quality else ("", "", "")),
                " ".join(map(str, row.by_seed)),
                *((other.value, other.low, other.high) if other else ("", "", "")),
                row.num_parameters,
                row.percent_of_base,
                row.training_seconds,
                row.training_cpu_seconds,
                row.file_bytes,
                row.serving_scope,
                row.serving_extra_percent,
                *(s.get(n, "") for s in (row.first_token, row.speed) for n in _QUARTILES),
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
        rf"Method & Parameters & \% of base & {_tex(comparison.metric.name)} & "
        rf"{comparison.clock} s & Serving \\",
        r"\midrule",
    ]
    for row in rows:
        cells = [_tex(row.label), *["--"] * 5]
        if row.quality is not None:
            cells[1:] = [
                f"{row.num_parameters:,}",
                f"{row.percent_of_base:.3g}",
                f"${shown(row.quality, factor).replace('±', chr(92) + 'pm')}$",
                f"{seconds(comparison, row):.0f}",
                _tex(row.serving_scope),
            ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex(text: str) -> str:
    for character in ("&", "%", "_", "#"):
        text = text.replace(character, "\\" + character)
    return text

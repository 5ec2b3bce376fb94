"""An evaluation as JSON, as Markdown, as a table in a terminal, and row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from reft_core.adapter import write_durably
from trainer.evaluation.evaluate import EvaluationReport, Result
from trainer.evaluation.scoring import OTHER, Confusion, Estimate
from trainer.evaluation.scoring.bootstrap import LEVEL, NUM_SAMPLES

EXAMPLES_FILE = "examples.jsonl"
_CONFUSION_TITLES = {"text": "generated answers", "choice": "likelihood"}
_MAX_LABELS_SHOWN = 12


def write_report(report: EvaluationReport, folder: Path, command: str = "") -> None:
    """Write ``report.json``, ``report.md`` and :data:`EXAMPLES_FILE` into ``folder``."""
    document = json.dumps(to_document(report, command), indent=1, ensure_ascii=False)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in examples(report))
    write_durably(folder / "report.json", document.encode())
    write_durably(folder / "report.md", to_markdown(report, command).encode())
    write_durably(folder / EXAMPLES_FILE, "".join(lines).encode())


def to_document(report: EvaluationReport, command: str = "") -> dict[str, object]:
    """All but the rows, as JSON values."""
    rows, options = report.rows, report.options
    return {
        "command": command,
        "data": {
            "path": str(rows.path),
            "sha256": rows.sha256,
            "num_rows": len(rows.rows),
            "num_in_file": rows.num_in_file,
        },
        "options": {
            "metrics": list(options.metrics),
            "extract": options.extract,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
        },
        "interval": {"level": LEVEL, "samples": NUM_SAMPLES, "kind": "percentile bootstrap"},
        "contenders": [_contender(result) for result in report.results],
    }


def _contender(result: Result) -> dict[str, object]:
    contender = result.contender
    return {
        "name": contender.name,
        "digest": None if contender.adapter is None else contender.adapter.digest,
        "metrics": {name: vars(found) for name, found in result.metrics.items()},
        "differences": {name: vars(found) for name, found in result.differences.items()},
        "confusions": {by: matrix.counts for by, matrix in result.confusions.items()},
        "num_cut": sum(reply.finish_reason == "length" for reply in result.replies),
    }


def examples(report: EvaluationReport) -> Iterator[dict[str, object]]:
    """Every row with every contender's answer and scores, as JSON values."""
    for place, row in enumerate(report.rows.rows):
        for result in report.results:
            reply, answered = result.replies[place], result.answered[place]
            yield {
                "id": row.id,
                "contender": result.contender.name,
                "prompt": row.question,
                "references": list(row.references),
                "answer": row.answer,
                "text": reply.text,
                "extracted": answered.predicted,
                "choice": answered.choice,
                "logprobs": dict(zip(row.choices, reply.logprobs, strict=False)),
                "loss": reply.loss,
                "num_tokens": reply.num_tokens,
                "finish_reason": reply.finish_reason,
                "scores": {name: each[place] for name, each in result.row_scores.items()},
            }


def to_table(report: EvaluationReport) -> Table:
    """The metrics of every contender side by side."""
    (first, *others), lines = _cells(report)
    table = Table(title=_title(report), title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    for metric, *cells in lines:
        # The interval under its value: several adapters fit side by side.
        table.add_row(metric, *(Text(cell.replace(" [", "\n[")) for cell in cells))
    return table


def to_markdown(report: EvaluationReport, command: str = "") -> str:
    """The report for people."""
    options = report.options
    head, lines = _cells(report)
    sections = [
        f"# Evaluation of {', '.join(result.contender.name for result in report.results)}",
        f"`{command}`" if command else "",
        f"{_title(report)}. SHA-256 of the file: `{report.rows.sha256}`.",
        f"In brackets: {LEVEL:.0%} percentile bootstrap intervals over the rows ({NUM_SAMPLES} "
        f"samples, seed {options.seed}); differences are of the same rows. Answers are greedy, of "
        f"at most {options.max_tokens} tokens, read by `{options.extract}`.",
        _markdown_table(head, lines),
    ]
    for result in report.results:
        for by, matrix in result.confusions.items():
            if len(matrix.labels) <= _MAX_LABELS_SHOWN:
                title = f"## {result.contender.name}: labels by {_CONFUSION_TITLES[by]}"
                sections += [title, _confusion_table(matrix)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(report: EvaluationReport) -> str:
    rows = report.rows
    of = f" of {rows.num_in_file}" if rows.num_in_file != len(rows.rows) else ""
    return f"{rows.path.parent.name}/{rows.path.name}, n = {len(rows.rows)}{of}"


def _cells(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of metrics."""
    first, *others = report.results
    head = ["metric", *(result.contender.name for result in report.results)]
    head += [f"{other.contender.name} − {first.contender.name}" for other in others]
    lines = []
    for metric in report.metrics:
        found = [result.metrics[metric.name] for result in report.results]
        found += [other.differences[metric.name] for other in others]
        lines.append([metric.name, *(_shown(each, metric.percent) for each in found)])
    return head, lines


def _shown(found: Estimate, percent: bool) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    value, low, high = (f"{scale * x:.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _confusion_table(matrix: Confusion) -> str:
    """Right labels down, answers across."""
    columns = (*matrix.labels, OTHER)
    return _markdown_table(
        ["right", *columns],
        [[label, *(str(matrix.counts[label][got]) for got in columns)] for label in matrix.labels],
    )


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, lines)])

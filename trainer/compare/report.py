"""The files that a comparison leaves for people and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from reft_core.adapter import write_durably
from trainer.compare.plot import to_png
from trainer.compare.render import to_csv, to_latex, to_markdown
from trainer.compare.run import Comparison
from trainer.compare.table import Row


def write_report(comparison: Comparison, rows: Sequence[Row], command: str) -> None:
    """Write ``report.md``, ``table.csv``, ``table.tex``, ``quality.png`` and ``report.json``."""
    document = {
        "command": command,
        "config": comparison.config.model_dump(mode="json"),
        "task": comparison.task,
        "metric": comparison.metric.name,
        "num_test_rows": len(comparison.references),
        "num_base_parameters": comparison.num_base_parameters,
        "rows": [asdict(row) for row in rows],
    }
    files = {
        "report.md": to_markdown(comparison, rows, command).encode(),
        "table.csv": to_csv(rows).encode(),
        "table.tex": to_latex(comparison, rows).encode(),
        "quality.png": to_png(comparison, rows),
        "report.json": json.dumps(document, indent=1, ensure_ascii=False).encode(),
    }
    for name, data in files.items():
        write_durably(comparison.config.out / name, data)

"""The data's rows as a task trains on them, written beside its results.

Rows are read from a folder that is named by the command, and never kept in the repository.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks import QualityTask

SPLITS = ("train", "valid", "test")


def prepare(task: QualityTask, data: Path, out: Path) -> Path:
    """Write the three splits of ``task`` under ``out``; the folder they are in."""
    folder = out / "rows" / task.name
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) for row in _rows(task, data, split)]
        _write(folder / f"{split}.jsonl", "".join(f"{line}\n" for line in lines))
    if task.words:
        _write(folder / "labels.json", json.dumps(list(task.words.values())))
    return folder


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    lines = file.read_text(encoding="utf-8").split("\n")  # other line ends may stand inside a text
    return [json.loads(line) for line in lines if line]


def _rows(task: QualityTask, data: Path, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one split that the task wants, in its words."""
    for row in read_rows(data / task.folder / f"{split}.jsonl"):
        if all(row[column] == value for column, value in task.where.items()):
            yield _in_words(task, row)


def _in_words(task: QualityTask, row: dict[str, Any]) -> dict[str, Any]:
    kept = {ours: row[theirs] for ours, theirs in task.columns.items() if theirs in row}
    if "label" in kept:
        kept["label"] = task.words.get(str(kept["label"]), kept["label"])
    return {"id": row["id"], **kept}


def _write(path: Path, text: str) -> None:
    """Whole or not at all: other processes may read it."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)

"""The table of docs/tickets.md is the committed result's."""

from __future__ import annotations

from pathlib import Path

from benchmarks.thirty import EXAMPLES, TASKS, read_outcomes, table

PAGE = Path(__file__).parents[2] / "docs" / "tickets.md"


def test_the_page_has_what_was_measured() -> None:
    outcomes = read_outcomes()
    assert table(outcomes) in PAGE.read_text(encoding="utf-8")
    for task, outcome in zip(TASKS, outcomes, strict=True):
        rows = (EXAMPLES / task.folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
        assert (outcome.folder, outcome.test_rows) == (task.folder, len(rows))

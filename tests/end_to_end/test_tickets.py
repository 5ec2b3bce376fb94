"""docs/tickets.md, run as it stands but for shorter trainings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.pages import ROOT, check_all_run, run_page

PAGE = ROOT / "docs" / "tickets.md"


def test_the_page_is_all_in_blocks_that_run() -> None:
    check_all_run(PAGE)


@pytest.mark.smollm2
def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    folder = Path("runs/tickets")
    less = {"training": "steps=4 eval_rows=4", "evaluation": "--limit 6"}
    shown = run_page(PAGE, tmp_path, folder / "server.log", **less)
    assert "tickets version 1 uploaded" in shown
    assert "tickets@2 at http" in shown
    assert "thirty@1 at http" in shown
    assert re.search(r'"label":"\w', shown), "/v1/classify names labels as people write them"
    assert "tickets is version 1" in shown
    files = {path.name for path in (tmp_path / folder).iterdir()}
    assert {"tickets.safetensors", "report.html", "report.json", "model_card.md"} <= files
    runs = [json.loads(line) for line in (tmp_path / "runs/runs.jsonl").read_text().splitlines()]
    assert [(run["name"], run["state"]) for run in runs] == [
        ("tickets", "finished"), ("tickets", "finished"), ("thirty", "finished"),
    ]  # fmt: skip
    assert re.search(r"tickets@1.*tickets@2", shown), "both versions were measured"

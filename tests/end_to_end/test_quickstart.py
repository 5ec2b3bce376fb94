"""docs/quickstart.md, run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.pages import ROOT, check_all_run, run_page

PAGE = ROOT / "docs" / "quickstart.md"


def test_the_page_is_all_in_blocks_that_run() -> None:
    check_all_run(PAGE)


@pytest.mark.smollm2
def test_every_command_of_the_quickstart_works(tmp_path: Path) -> None:
    shown = run_page(PAGE, tmp_path, Path("runs/quickstart/server.log"))
    assert "pirate version 1 uploaded" in shown
    assert "pirate version 2 uploaded" in shown
    compared = shown.partition("--compare")[2]
    for who in ("base model · 0 edits", "pirate@1", "pirate@2"):
        assert who in compared
    assert shown.count("Arr") >= 3, shown
    assert "16 requests in" in shown

"""Pages for people name files that are there, and the list of pages has them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
# What pages shorten.
SHORT = {
    "engine": "reft_core/engine",
    "methods": "reft_core/methods",
    "results": "benchmarks/results",
}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    # docs/api.md and the like are links; runs/ and .venv/ are made.
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)(?=[`:])", text)
    named = [name for name in named if not name.startswith("runs/")]
    assert named
    missing = [name for name in named if not (ROOT / _whole(name)).exists()]
    assert missing == []


def test_the_tree_of_the_readme_names_what_is_there():
    tree = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    folder, missing = ROOT, []
    for line in tree.strip().splitlines():
        names = re.match(r"( *)((?:[\w.]+(?:/[\w.]+)*/? )+)", line)
        assert names is not None, line
        if not names[1]:
            folder = ROOT
        found = re.findall(r"[\w./]+(?:/|\.py|\.md)", names[2])
        missing += [name for name in found if not (folder / name).exists()]
        if not names[1] and found[0].endswith("/"):
            folder = ROOT / found[0]
    assert missing == []


def test_every_page_is_listed():
    listed = re.findall(r"\]\(([a-z-]+\.md)\)", (ROOT / "docs" / "README.md").read_text())
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(listed) == pages


def _whole(name: str) -> str:
    first, _, rest = name.partition("/")
    return f"{SHORT[first]}/{rest}" if first in SHORT else name

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


def test_the_map_names_every_package():
    text = (ROOT / "docs/architecture.md").read_text()
    packages = {
        str(init.parent.relative_to(ROOT))
        for top in ("reft_core", "server", "trainer")
        for init in (ROOT / top).rglob("__init__.py")
    }
    # What is below a package that is named there, and has a page or a table of its own.
    below = {name for name in packages if re.match(r"reft_core/convert/|server/migrations/", name)}
    missing = [name for name in packages - below if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_the_map_has_every_file_of_the_other_engine():
    section = (ROOT / "docs/architecture.md").read_text().split("## The other engine")[1]
    named = set(re.findall(r"`(\w+\.py)`", section.split("\n## ")[0]))
    files = {path.name for path in (ROOT / "reft_core/vllm").glob("*.py")} - {"__init__.py"}
    assert named == files


@pytest.mark.parametrize(
    ("package", "other", "allowed"),
    [
        ("reft_core", "server|trainer", ()),
        ("server", "trainer", ("server/cli/",)),
        ("trainer", "server", ("trainer/evaluation/asking/url.py",)),
    ],
)
def test_imports_point_the_ways_that_the_map_says(package, other, allowed):
    imports = re.compile(rf"^ *(?:from|import) (?:{other})\b", re.MULTILINE)
    for path in (ROOT / package).rglob("*.py"):
        name = str(path.relative_to(ROOT))
        assert name.startswith(allowed) or not imports.search(path.read_text()), name


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

"""``scripts/install``, with a pip that only notes what it was asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Project:
    """A folder with what the script reads, and an environment of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", folder)
        tools = folder / ".venv" / "bin"
        tools.mkdir(parents=True)
        for name, body in (("pip", 'echo "$@" >>asked'), ("python", "")):
            (tools / name).write_text(f"#!/bin/sh\n{body}\n")
            (tools / name).chmod(0o755)

    def install(self, *extras: str, **variables: str) -> list[str]:
        """What pip was asked to do."""
        asked = self.folder / "asked"
        asked.unlink(missing_ok=True)
        environment = {"PATH": os.environ["PATH"], **variables}
        command = ["scripts/install", *extras]
        subprocess.run(command, cwd=self.folder, env=environment, check=True, capture_output=True)
        return asked.read_text().splitlines() if asked.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_every_target_sets_itself_up() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):.*\n\t(.*)$", text, re.MULTILINE)
    bare = {name for name, first in targets if "scripts/install" not in first}
    assert bare == {"help", "test-vllm", "clean"}, ".ci/vllm installs; the others need nothing"


def test_installs_once(project: Project) -> None:
    assert "install -e .[demo,train]" in project.install("demo", "train")
    assert project.install("demo", "train") == []
    assert project.install("demo") == []
    assert "install -e .[test]" in project.install("test")


def test_the_tests_extra_includes_the_others(project: Project) -> None:
    assert project.install("test")
    for extras in (("demo",), ("demo", "train"), ("test",)):
        assert project.install(*extras) == []


def test_installs_again_when_what_decides_has_changed(project: Project) -> None:
    project.install("demo")
    constrained = project.install("demo", CONSTRAINT="transformers==5.16.*")
    assert "install transformers==5.16.* -e .[demo]" in constrained
    with (project.folder / "pyproject.toml").open("a") as file:
        file.write("# another dependency\n")
    assert project.install("demo", CONSTRAINT="transformers==5.16.*")

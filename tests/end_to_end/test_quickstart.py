"""docs/quickstart.md, run as it stands: its shell blocks, one after another, in one shell."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from server.cli.adapters import adapters_app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quickstart.md"
TIMEOUT_S = 600


def shell_blocks() -> list[str]:
    """The page's commands, block by block."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def prepare(folder: Path) -> None:
    """A clone as the page leaves it after its first command, made of what is installed here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = "|".join(extras["optional-dependencies"])
    (folder / "scripts").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    programs = {
        "scripts/install": f'for extra; do case "$extra" in {known}) ;; *) exit 2;; esac; done',
        ".venv/bin/reft": f'exec "{sys.executable}" -m server "$@"',
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / name).chmod(0o755)


def test_the_page_is_all_in_blocks_that_run() -> None:
    fences = re.findall(r"^```(.*)$", PAGE.read_text(), re.MULTILINE)
    assert set(fences) == {"sh", ""}, "a block in another language would not be run"
    assert len(shell_blocks()) * 2 == len(fences)


@pytest.mark.smollm2
def test_every_command_of_the_quickstart_works(tmp_path: Path) -> None:
    prepare(tmp_path)
    script = "\n".join(f"set -x\n{block}\n{{ set +x; }} 2>/dev/null" for block in shell_blocks())
    script = script.replace("8000", str(free_port()))
    if not any(each.callback.__name__ == "promote" for each in adapters_app.registered_commands
               if each.callback):  # fmt: skip
        script = re.sub(r"^reft adapter promote .*$", "", script, flags=re.MULTILINE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REFT_")}
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        shown, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the server, if the script did not get there
    log = tmp_path / "runs" / "quickstart" / "server.log"
    assert process.returncode == 0, f"{shown}\n{log.read_text() if log.is_file() else ''}"
    assert "pirate version 1 uploaded" in shown
    assert "pirate version 2 uploaded" in shown
    compared = shown.partition("--compare")[2]
    for who in ("base model · 0 edits", "pirate@1", "pirate@2"):
        assert who in compared
    assert shown.count("Arr") >= 3, shown
    assert "16 requests in" in shown

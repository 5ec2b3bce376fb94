"""A page's shell blocks, run as they stand, one after another, in one shell."""

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

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def shell_blocks(page: Path) -> list[str]:
    """The page's commands, block by block."""
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def check_all_run(page: Path) -> None:
    """Fail if a block of the page is in another language, which would not be run."""
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences) == {"sh", ""}, "a block in another language would not be run"
    assert len(shell_blocks(page)) * 2 == len(fences)


def run_page(
    page: Path, folder: Path, server_log: Path, *, training: str = "", evaluation: str = ""
) -> str:
    """What the page's commands print in ``folder``, made to look like a clone of the project.

    ``training`` goes to every ``reft train`` and ``evaluation`` to every ``reft eval``, so that
    they take less time.
    """
    _prepare(folder)
    blocks = shell_blocks(page)
    script = "\n".join(f"set -x\n{block}\n{{ set +x; }} 2>/dev/null" for block in blocks)
    script = script.replace("8000", str(free_port()))
    script = re.sub(r"^(reft train .*)$", rf"\1 {training}", script, flags=re.MULTILINE)
    script = script.replace("reft eval ", f"reft eval {evaluation} ")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REFT_")}
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
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
    log = folder / server_log
    assert process.returncode == 0, f"{shown}\n{log.read_text() if log.is_file() else ''}"
    return shown


def _prepare(folder: Path) -> None:
    """A clone as pages leave it after their first command, made of what is installed here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = "|".join(extras["optional-dependencies"])
    (folder / "scripts").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "examples").symlink_to(ROOT / "examples")
    programs = {
        "scripts/install": f'for extra; do case "$extra" in {known}) ;; *) exit 2;; esac; done',
        ".venv/bin/reft": f'exec "{sys.executable}" -m server "$@"',
        ".venv/bin/python": f'exec "{sys.executable}" "$@"',
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / name).chmod(0o755)

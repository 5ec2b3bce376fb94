from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import environments
from benchmarks.peers.environments import Environment, python_of
from benchmarks.peers.protocol import PeerMissing

NOBODY = Environment("nobody", ("nobody==1.0",), removed=("somebody",))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run."""
    run: list[list[str]] = []

    def pretend(command: list[str], **_: Any) -> None:
        run.append(command)
        (tmp_path / ".venv-bench-nobody").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setattr(environments, "LOGS", tmp_path)
    monkeypatch.setenv("BENCH_ENVS", str(tmp_path))
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    return run


def test_installs_once_where_it_is_told(tmp_path: Path, commands: list[list[str]]) -> None:
    python = python_of(NOBODY)
    assert python == tmp_path / ".venv-bench-nobody" / "bin" / "python"
    assert [command[1:4] for command in commands[1:]] == [
        ["-m", "pip", "install"],
        ["-m", "pip", "uninstall"],
    ]
    python_of(NOBODY)
    assert len(commands) == 3
    python_of(Environment("nobody", ("nobody==2.0",)))
    assert commands[-1][-1] == "nobody==2.0"


def test_a_failed_installation_makes_the_peer_missing(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], *, stdout: Any, **_: Any) -> None:
        stdout.write("ERROR: no C++ compiler\n")
        stdout.flush()
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(PeerMissing, match=r"cannot be installed: ERROR: no C\+\+ compiler"):
        python_of(NOBODY)

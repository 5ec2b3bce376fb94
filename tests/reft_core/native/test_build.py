"""Compiling the kernels: once, in a folder of the user's own, and never at the cost of a start."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from reft_core.native import build

needs_compiler = pytest.mark.skipif(build.load_library() is None, reason="no C++ compiler here")


@needs_compiler
def test_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "native"
    built = build._compiled(folder)
    assert [path.name for path in folder.iterdir()] == [built.name]
    assert folder.stat().st_mode & 0o077 == 0
    commands: list[list[str]] = []
    real = build._run
    monkeypatch.setattr(build, "_run", lambda command: commands.append(command) or real(command))
    assert build._compiled(folder) == built
    assert not [command for command in commands if "-o" in command]


@needs_compiler
def test_another_machine_gets_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build._compiled(tmp_path)
    monkeypatch.setattr(build, "_instruction_sets", lambda: "another processor")
    assert build._compiled(tmp_path) != first


@pytest.mark.parametrize("compilers", [(), ("false",)])
def test_without_a_working_compiler_there_are_no_kernels(
    compilers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "COMPILERS", compilers)
    with caplog.at_level(logging.INFO):
        assert build.load_library.__wrapped__() is None
    assert "native kernels are not used" in caplog.text

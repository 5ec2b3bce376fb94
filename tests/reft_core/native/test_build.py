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
    compiled = _compile_nothing(monkeypatch)
    assert build._compiled(folder) == built
    assert compiled == []


@needs_compiler
def test_another_machine_gets_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = _compile_nothing(monkeypatch)
    first = build._compiled(tmp_path)
    monkeypatch.setattr(build, "_instruction_sets", lambda: "another processor")
    second = build._compiled(tmp_path)
    assert [path.name for path in compiled] == [first.name, second.name]
    assert first != second


def _compile_nothing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What the compiler is asked for from now on; it takes seconds, and gives empty files here."""
    compiled: list[Path] = []
    real = build._run

    def run(command: list[str]) -> str:
        if "-o" not in command:
            return real(command)
        compiled.append(Path(command[command.index("-o") + 1]))
        compiled[-1].touch()
        return ""

    monkeypatch.setattr(build, "_run", run)
    return compiled


@pytest.mark.parametrize("compilers", [(), ("false",)])
def test_without_a_working_compiler_there_are_no_kernels(
    compilers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "COMPILERS", compilers)
    with caplog.at_level(logging.INFO):
        assert build.load_library.__wrapped__() is None
    assert "native kernels are not used" in caplog.text

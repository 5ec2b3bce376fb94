"""The terminal around comparison and sweep, and what ``reft train`` makes of their sections."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from server.cli.main import app
from tests.trainer.factories import byte_model, make_config
from trainer import preparing
from trainer.config.file import load_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config file with both sections, of runs that take a second."""
    monkeypatch.setattr(preparing, "load_any", lambda *_, **__: byte_model())
    made = make_config(tmp_path, epochs=1, labels=("y", "n"))
    document = made.model_dump(mode="json", exclude_defaults=True)
    document["compare"] = {"methods": ["zero_shot", "red"], "seeds": [0], "search": 1}
    document["sweep"] = {"trials": 1, "space": {"rank": [1, 2], "layers": "all"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_compare_reads_its_section_and_flags(config: Path, tmp_path: Path) -> None:
    flags = ["--methods", "red", "--out", str(tmp_path / "here")]
    result = CliRunner().invoke(app, ["compare", str(config), "batch_size=4", *flags])
    assert result.exit_code == 0, result.output
    assert "RED" in result.stdout
    report = (tmp_path / "here" / "report.md").read_text()
    assert "zero-shot" not in report
    assert "1 epochs of 4 rows" in report


def test_sweep_reads_its_section_and_flags(config: Path, tmp_path: Path) -> None:
    flags = ["--space", "rank=[2]", "--space", "last=1", "--out", str(tmp_path / "here")]
    result = CliRunner().invoke(app, ["sweep", str(config), *flags])
    assert result.exit_code == 0, result.output
    best = load_config(tmp_path / "here" / "best.yaml")
    assert best.rank == 2
    assert best.layers == "all"
    assert str(tmp_path / "here" / "best.yaml") in result.stdout.replace("\n", "")


def test_a_sweep_in_a_database_tells_nobody_its_password(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}?timeout=31"  # an option as a password may be
    arguments = ["sweep", str(config), "--storage", url, "--out", str(tmp_path / "here")]
    monkeypatch.setattr("sys.argv", ["reft", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = "".join(path.read_text() for path in (tmp_path / "here").glob("*.*"))
    assert "timeout=31" not in written + result.output
    assert "--storage" in written


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["compare", "--methods", "loraft"], "did you mean"),
        (["compare", "--seeds", "a"], "seeds"),
        (["compare", "labels=null", "--methods", "head_only"], "it needs labels"),
        (["compare", "test=null"], "test: missing"),
        (["sweep", "--space", "rnak=[1]"], "did you mean 'rank'"),
        (["sweep", "--space", "rank"], "expected name=value"),
        (["sweep", "--objective", "f1"], "objective"),
    ],
)
def test_mistakes_are_one_message(config: Path, arguments: list[str], problem: str) -> None:
    command, *rest = arguments
    result = CliRunner().invoke(app, [command, str(config), *rest])
    assert result.exit_code == 1
    assert problem in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_a_training_passes_over_the_sections(config: Path) -> None:
    assert load_config(config).labels == ("y", "n")

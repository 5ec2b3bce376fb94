from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_core.adapter import read_adapter
from server.cli.main import app
from tests.factories import tiny_model
from tests.reft_core.test_classifiers import word_tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def steer(tmp_path: Path, model: Path):
    (tmp_path / "for.txt").write_text("a b c\n\nyes perhaps\n")
    (tmp_path / "against.txt").write_text("no\nd e\n")

    def run(*options: str):
        files = ["--positive", str(tmp_path / "for.txt"), "--negative", f"{tmp_path}/against.txt"]
        given = ["--model", str(model), *files, "--layers", "1,3", "--out", f"{tmp_path}/mood.st"]
        return runner.invoke(app, ["adapter", "steer", *given, *options])

    return run


def test_two_files_of_prompts_make_an_adapter(steer, tmp_path: Path) -> None:
    result = steer("--phase", "all", "--positions", "l2")
    assert result.exit_code == 0, result.output
    assert "mood: Steering from 2 prompts against 2; 64 parameters" in result.output
    spec = read_adapter(tmp_path / "mood.st").spec
    assert spec.sites["block_output"].layers == (1, 3)
    assert (spec.sites["block_output"].phase, spec.positions.rule) == ("all", "l2")
    assert steer().exit_code == 1, "the file exists"
    assert steer("--force", "--raw", "--layers", "all").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "one"), "layers: got 'one'"),
        (("--layers", "7"), "layers: got"),
        (("--phase", "decode"), "phase: got 'decode', expected 'prompt' or 'all'"),
        (("--positive", "nowhere.txt"), "positive: got 'nowhere.txt'"),
        (("--site", "nowhere"), "sites: got 'nowhere'"),
    ],
)
def test_what_is_wrong_is_one_line(steer, options: tuple[str, ...], message: str) -> None:
    result = steer(*options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output

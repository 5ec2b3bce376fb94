"""``reft eval`` as it is typed: a table, a folder, and no question asked twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from tests.factories import random_adapter_bytes
from tests.reft_core.test_seq2seq import loaded
from tests.trainer.classify.test_task import word_tokenizer
from tests.trainer.factories import byte_model, write_rows
from trainer.evaluation import local
from trainer.evaluation.asking import Question, Reply
from trainer.evaluation.command import _shown_arguments

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    loaded = byte_model()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows: list[object] = [{"text": f"is it {n}", "label": "ny"[n % 2]} for n in range(12)]
    return write_rows(tmp_path / "data.jsonl", rows)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("one", "two"):
        made = random_adapter_bytes(byte_model().description, seed=len(name), size=4, name=name)
        (folder / f"{name}.safetensors").write_bytes(made)
    return folder


def run(*arguments: object):
    return runner.invoke(app, ["eval", *map(str, arguments)])


def test_a_folder_of_adapters_beside_the_base(
    model: Path, data: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("--model", model, "-a", adapters, "--data", data, "--limit", 8, "--out", out)
    first = run(*arguments, "--json")
    assert first.exit_code == 0, first.output
    report = json.loads((out / "report.json").read_text())
    assert [each["name"] for each in report["contenders"]] == ["base", "one", "two"]
    assert (report["data"]["num_rows"], report["data"]["num_in_file"]) == (8, 12)
    lines = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    for each in report["contenders"]:
        scores = [
            line["scores"]["likelihood_accuracy"]
            for line in lines
            if line["contender"] == each["name"]
        ]
        assert each["metrics"]["likelihood_accuracy"]["value"] == pytest.approx(sum(scores) / 8)
    page = (out / "report.md").read_text()
    assert "two − base" in page
    assert "labels by likelihood" in page

    def refuse(self: object, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        assert not questions, "every reply is known"
        return iter(())

    monkeypatch.setattr(local.LocalAsker, "ask", refuse)
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    assert "likelihood_accuracy" in again.output
    found = json.loads((out / "report.json").read_text())
    assert found["contenders"] == report["contenders"]


def test_an_encoder_decoder_and_a_split(tmp_path: Path) -> None:
    loaded("t5").model.save_pretrained(tmp_path / "t5")
    word_tokenizer().save_pretrained(tmp_path / "t5")
    for split, label in (("valid", "b"), ("test", "c")):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": "a b", "label": label}] * 3)
    (tmp_path / "labels.json").write_text('["b", "c"]')
    found = run("--model", tmp_path / "t5", "--data", tmp_path, "--split", "valid", "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["data"]["path"].endswith("valid.jsonl")
    (base,) = report["contenders"]
    assert base["confusions"]["choice"]["c"] == {"b": 0, "c": 0, "(other)": 0}
    assert sum(base["confusions"]["choice"]["b"].values()) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metrics", "blue"], ["metrics", "'blue'", "bleu"]),
        (["--template", "jinja"], ["template", "auto, chat, plain"]),
        (["--prompt", "no place"], ["prompt", "{content}"]),
        (["--split", "dev"], ["split", "'dev'", "train, valid, test"]),
        (["--dtype", "int4"], ["dtype", "bfloat16"]),
        (["--extract", "magic"], ["extract", "last_number"]),
        (["-a", "nowhere.safetensors"], ["adapter", "nowhere.safetensors"]),
        (["--no-base"], ["adapter", "at least one"]),
        (["--metrics", "execution_accuracy"], ["database", "SQLite"]),
    ],
)
def test_a_wrong_option_is_named(
    model: Path, data: Path, arguments: list[str], words: list[str]
) -> None:
    found = run("--model", model, "--data", data, *arguments)
    assert found.exit_code == 1
    for word in words:
        assert word in found.output


def test_a_key_is_not_in_the_report() -> None:
    shown = _shown_arguments(["eval", "--key", "secret", "--key=secret", "--data", "x"])
    assert shown == ["eval", "--key", "***", "--key=***", "--data", "x"]

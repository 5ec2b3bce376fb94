"""``reft train --serve`` on a real server over a tiny model, and what stops it early."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.loading import LoadedModel
from server.cli.main import app
from tests.server.conftest import ADMIN_KEY, API_KEY
from tests.trainer.factories import byte_model, label_rows, write_rows
from trainer import preparing


class _Engine(EmbeddedEngine):
    def resume(self) -> None:
        """There is nothing that a test stopped."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-bytes"
    loaded = byte_model()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded() -> LoadedModel:
    return byte_model()


@pytest.fixture
def engine(loaded: LoadedModel) -> _Engine:
    return _Engine(loaded, EngineConfig(max_model_len=128))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path / "yesno.jsonl", label_rows(0, 40))


def train(rows: Path, base: Path, *more: str):
    settings = [f"model={base}", "epochs=6", "rank=4", "learning_rate=2e-2", "positions=prompt"]
    return CliRunner().invoke(app, ["train", str(rows), *settings, *more])


def test_an_adapter_is_trained_uploaded_and_asked(on_socket, rows: Path, base: Path) -> None:
    with on_socket() as server:
        more = ("--serve", server.url, "--key", ADMIN_KEY)
        first = train(rows, base, *more)
        assert first.exit_code == 0, first.output
        told = dict(re.findall(r"^(served|asked|expected|base|adapter) +(.*)$", first.output, re.M))
        assert told["served"] == f"yesno@1 at {server.url}"
        assert told["asked"].startswith("no ")
        assert told["expected"] == "yn"["ab".index(told["asked"][-1])]
        assert told["adapter"] != told["base"]
        assert "yesno@2" in train(rows, base, *more, "--seed", "3").output
        models = server.http.get("/v1/models").json()["data"]
        assert [card["id"] for card in models] == ["tiny-bytes", "yesno"]


def test_a_server_that_may_not_be_asked_has_it_all_the_same(
    on_socket, rows: Path, base: Path
) -> None:
    with on_socket(api_key=API_KEY) as server:
        more = ("--serve", server.url, "--key", ADMIN_KEY)
        first = train(rows, base, *more)
        assert first.exit_code == 0, first.output
        assert re.search(r"^not asked +.*REFT_API_KEY", first.output, re.M)
        asked = train(rows, base, *more, "--user-key", API_KEY)
        assert re.search(r"^expected +[yn]$", asked.output, re.M)


@pytest.mark.parametrize("wrong", ["address", "key", "base"])
def test_nothing_is_trained_for_a_server_that_cannot_take_it(
    on_socket, rows: Path, base: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr(preparing, "load_any", loads)
    with on_socket() as server:
        url = "http://127.0.0.1:9" if wrong == "address" else server.url
        key = "wrong-key-wrong-key" if wrong == "key" else ADMIN_KEY
        model = ["model=demo"] if wrong == "base" else []
        refused = train(rows, base, *model, "--serve", url, "--key", key)
    assert refused.exit_code == 1
    expected = {
        "address": "nothing answers at",
        "key": "REFT_ADMIN_KEY",
        "base": r"serves tiny-bytes, and model is 'demo', of another shape \(base.hidden_size",
    }
    assert re.search(expected[wrong], refused.output), refused.output
    assert not Path("runs").exists()


def test_a_key_is_asked_for(rows: Path, base: Path) -> None:
    refused = train(rows, base, "--serve", "http://127.0.0.1:9")
    assert refused.exit_code == 2

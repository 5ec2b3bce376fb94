from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from reft_core import __version__
from reft_core.errors import AdapterError, ReftError
from reft_core.sites import describe_model
from server.app import create_app
from server.cli.main import app
from server.cli.serve import load_app
from server.http.run import _SAME_SIGNAL_S
from server.settings import Settings
from tests.server.conftest import ADMIN_KEY
from tests.server.fakes import make_adapter, make_tokenizer

runner = CliRunner()


def run(*args: str, env: dict[str, str] | None = None):
    return runner.invoke(app, list(args), env=env)


def test_version():
    result = run("version")
    assert (result.exit_code, result.output.strip()) == (0, __version__)


def test_help_names_every_command():
    shown = run("--help").output
    for command in ("serve", "adapter", "methods", "train", "version"):
        assert command in shown


def test_quick_commands_import_nothing_heavy():
    code = (
        "import sys; from server.cli.main import app\n"
        "try: app(['version'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'sqlalchemy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [__version__, "[]"]


def test_inspect_shows_the_spec(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(make_adapter(1, description="polite [bold]\x1b[31m answers"))
    result = run("adapter", "inspect", str(path))
    assert result.exit_code == 0
    for expected in ("tone", "polite [bold]", "direft", "l2", "tiny-base", "68"):
        assert expected in result.output
    assert "\x1b[31m" not in result.output


@pytest.mark.parametrize(
    ("data", "mention"), [(b"", "body"), (b"x" * 100, "body"), (make_adapter(1)[:-9], "body")]
)
def test_inspecting_a_hostile_file_is_one_clear_line(tmp_path, data, mention):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    result = run("adapter", "inspect", str(path))
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert mention in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_missing_file_is_one_clear_line(tmp_path):
    result = run("adapter", "inspect", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "none: No such file" in result.output.replace("\n", "")


def test_push_list_and_rm_against_a_server(live, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(make_adapter(1))
    env = {"REFT_ADMIN_KEY": ADMIN_KEY, "REFT_URL": live.url, "COLUMNS": "120"}
    pushed = run("adapter", "push", str(path), env=env)
    assert pushed.exit_code == 0, pushed.output
    assert "tone version 1 uploaded" in pushed.output
    again = run("adapter", "push", str(path), "--name", "tone", env=env)
    assert "was there already" in again.output
    listed = run("adapter", "list", env=env)
    assert "tone" in listed.output
    assert "none seen" in listed.output
    (card,) = json.loads(run("adapter", "list", "--json", env=env).stdout)
    assert (card["name"], card["version"], card["num_users"]) == ("tone", 1, None)
    removed = run("adapter", "rm", "tone", env=env)
    assert "tone deleted" in removed.output
    gone = run("adapter", "rm", "tone", env=env)
    assert gone.exit_code == 1
    assert "got 'tone', expected one of" in gone.output


def test_versions_are_managed_from_the_command_line(live, tmp_path):
    env = {"REFT_ADMIN_KEY": ADMIN_KEY, "REFT_URL": live.url, "COLUMNS": "160"}
    for seed in (1, 2):
        live.upload("tone", make_adapter(seed))
    assert "tone is version 1" in run("adapter", "promote", "tone", "1", env=env).output
    assert "tone is version 2" in run("adapter", "rollback", "tone", env=env).output
    assert "tone is version 2" in run("adapter", "pin", "tone", env=env).output
    shown = run("adapter", "show", "tone", env=env).output
    assert "pinned" in shown
    assert "previous" in shown
    told = json.loads(run("adapter", "show", "tone", "--json", env=env).stdout)
    assert (told["current"], told["previous"], told["pinned"]) == (2, 1, True)
    assert [version["version"] for version in told["versions"]] == [1, 2]
    run("adapter", "unpin", "tone", env=env)
    out = tmp_path / "pulled.safetensors"
    pulled = run("adapter", "pull", "tone@1", "--out", str(out), env=env)
    assert pulled.exit_code == 0, pulled.output
    assert out.read_bytes() == make_adapter(1)
    again = run("adapter", "pull", "tone@1", "--out", str(out), env=env)
    assert "--force" in again.output.replace("\n", " ")
    assert list(tmp_path.glob(".*.part")) == []
    own = run("adapter", "push", str(out), "--tenant", "acme", "--name", "x", env=env)
    assert own.exit_code == 0, own.output
    assert "acme/x" in run("adapter", "list", env=env).output
    assert "acme" not in run("adapter", "list", "--prefix", "to", env=env).output
    assert "deleted: version 1" in run("adapter", "rm", "tone@1", env=env).output
    odd = run("adapter", "rm", "tone@x", env=env)
    assert (odd.exit_code, "name@ and a number" in odd.output.replace("\n", " ")) == (1, True)


def test_the_registry_is_checked_and_repaired(tmp_path):
    from server.registry import Registry
    from tests.server.fakes import MODEL

    registry = Registry.open(tmp_path, MODEL, 1 << 20)
    digest = registry.upload("tone", make_adapter(1)).version.digest
    registry.close()
    env = {"REFT_DATA_DIR": str(tmp_path)}
    fine = run("registry", "check", env=env)
    assert (fine.exit_code, fine.output) == (0, "1 versions checked, 0 found\n")
    (tmp_path / "blobs" / digest[:2] / f"{digest}.safetensors").unlink()
    found = run("registry", "check", env=env)
    assert found.exit_code == 1
    assert f"missing file: tone@1 (sha256:{digest}); --repair:" in found.output
    assert run("registry", "check", "--repair", env=env).exit_code == 0
    assert run("registry", "check", env=env).exit_code == 0


def test_client_errors_are_one_clear_line(live, tmp_path):
    wrong = run("adapter", "list", "--url", live.url, "--key", "wrong")
    assert (wrong.exit_code, "wrong key" in wrong.output) == (1, True)
    nobody = run("adapter", "list", "--url", "http://127.0.0.1:9", "--key", "x")
    assert nobody.exit_code == 1
    assert "refused" in nobody.output
    strange = run("adapter", "list", "--url", "file:///etc/passwd", "--key", "x")
    assert strange.exit_code == 1
    assert "http://" in strange.output


def test_a_setting_that_cannot_work_is_one_clear_line(tmp_path):
    """As a process; :mod:`tests.server.cli.test_mistakes` has more of them."""
    shown = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--data-dir", str(tmp_path), "--port", "99999"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: port: got '99999'")
    assert len(shown.stderr.strip().splitlines()) == 1


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("REFT_")}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("start", [load_app, lambda settings: begin(create_app(settings))])
def test_an_adapter_for_another_model_is_refused_before_the_engine_begins(
    model_folder, tmp_path, monkeypatch, start
):
    for place in ("server.engines", "server.app"):
        monkeypatch.setattr(f"{place}.build_engine", lambda *_: pytest.fail("the engine begins"))
    path = tmp_path / "a.safetensors"
    path.write_bytes(make_adapter(1))
    settings = Settings(
        model=str(model_folder), data_dir=tmp_path / "data", adapters=(path,), port=0
    )
    with pytest.raises(AdapterError, match=r"a\.safetensors.*base"):
        start(settings)


def test_an_engine_that_is_there_already_ends_with_a_start_that_fails(
    engine, loaded, tmp_path, monkeypatch
):
    stopped = []
    monkeypatch.setattr(engine, "stop", lambda: stopped.append(engine))
    settings = Settings(data_dir=tmp_path / "data", host="0.0.0.0")
    with pytest.raises(ReftError, match="host"):
        begin(create_app(settings, engine, loaded))
    assert stopped == [engine]


def begin(app: FastAPI) -> None:
    with TestClient(app):
        pass


class Process:
    """``reft serve`` as users run it."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", "0", "--num-threads", "1", *args],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(REFT_ADMIN_KEY=ADMIN_KEY),
        )
        self.shown = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.shown += line

    def url(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+", self.shown)
            if found and "is ready" in self.shown:  # the log has the address before the banner
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"no banner in:\n{self.shown}")

    def end(self) -> int:
        code = self.process.wait(30)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


def test_a_real_server_from_banner_to_second_signal(model_folder, tmp_path):
    """The real engine under the real command. A stream outlives one signal, and not a second."""
    from transformers import AutoModelForCausalLM

    description = describe_model(AutoModelForCausalLM.from_pretrained(model_folder), "x")
    path = tmp_path / "a.safetensors"
    path.write_bytes(make_adapter(1, base=description.to_base_spec()))
    process = Process(
        "--model", str(model_folder), "--data-dir", str(tmp_path / "data"), "--adapter", str(path)
    )
    try:
        url = process.url()
        assert "reft-serve is ready" in process.shown
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            base, tone = (model.id for model in client.models.list())
            assert tone == "tone"
            texts = {
                model: client.completions.create(
                    model=model, prompt="hello", max_tokens=12, temperature=0
                ).choices[0].text
                for model in (base, tone)
            }  # fmt: skip
            assert texts[base] != texts[tone]
            answer = client.completions.create(
                model=tone, prompt="hello", temperature=0, extra_body={"reft": {"strength": 0}},
                max_tokens=12,
            )  # fmt: skip
            assert answer.choices[0].text == texts[base]
            assert client.completions.create(
                model=tone, prompt="hello", max_tokens=3
            ).reft["num_edits"] > 0  # fmt: skip

            chunks = client.completions.create(
                model=tone,
                prompt="x",
                stream=True,
                max_tokens=2000,
                n=8,
                extra_body={"ignore_eos": True},
            )
            next(chunks)
            process.process.send_signal(signal.SIGTERM)
            time.sleep(_SAME_SIGNAL_S + 0.1)
            next(chunks)
            process.process.send_signal(signal.SIGTERM)
            assert process.end() == 128 + signal.SIGTERM
        assert "draining" in process.shown
        assert "Traceback" not in process.shown
    finally:
        process.process.kill()
        process.end()

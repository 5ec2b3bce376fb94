"""Likely mistakes on the command line: one line each, what to do, the right exit status."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.settings.fields import all_fields
from tests.server.conftest import ADMIN_KEY
from tests.server.fakes import make_adapter

runner = CliRunner()
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _logs_stay(monkeypatch):
    """Logs would go to a stream that ends with its command, and stay there for later tests."""
    monkeypatch.setattr("server.observability.logs.configure_logging", lambda *_: None)


def one_line(status: int, *args: str, env: dict[str, str] | None = None) -> str:
    """What a command says, which must be one line and end with ``status``."""
    result = runner.invoke(app, list(args), env={"COLUMNS": "60"} | (env or {}))
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("args", "mention"),
    [
        (["serv"], "serve"),
        (["serve", "--prot", "1"], "--port"),
        (["serve", "--port"], "--port"),
        (["adapter", "push"], "file"),
        (["adapter", "pusch", "x"], "push"),
        (
            ["adapter", "push", "x", "--hub", "me/x", "--name", "y"],
            "--name: got 'y', but has no use",
        ),
        (["adapter", "push", "x", "--hub", "me/x", "--signature", "y"], "--signature"),
        (["adapter", "push", "x", "--hub", "me/x", "--tenant", "y"], "--tenant"),
        (["adapter", "push", "x", "--hub", "me/x", "--url", "http://y"], "--url"),
        (["adapter", "push", "x", "--key", "k", "--private"], "--private: got True, but has a use"),
        (["adapter", "push", "x", "--key", "k", "--revision", "y"], "--revision"),
        (["adapter", "push", "x", "--key", "k", "--base-model", "y"], "--base-model"),
        (["bench", "-n", "none"], "--requests"),
        (["bench", "-n", "0"], "equal to 1"),
        (["chat", "--temperature", "-1"], "temperature"),
    ],
)
def test_usage(args, mention):
    line = one_line(2, *args)
    assert mention.lower() in line.lower()
    assert "--help" in line


@pytest.mark.parametrize(
    ("args", "mentions"),
    [
        (["serve", "--port", "http"], ("port: got 'http'", "0 to 65535", "--port")),
        (["serve", "--port", "99999"], ("port: got '99999'", "0 to 65535")),
        (["serve", "--dtype", "int3"], ("dtype: got 'int3'", "bfloat16")),
        (["serve", "--host", "0.0.0.0"], ("host", "REFT_API_KEY")),
        (["serve", "--config", "/no/reft.yaml"], ("config: got '/no/reft.yaml'", "No such file")),
        (["serve", "--data-dir", "/dev/null/x"], ("data_dir: got '/dev/null/x'", "--data-dir")),
        (["chat", "-m", "x", "--url", NOBODY], (NOBODY, "reft serve", "--url")),
        (["chat", "-m", "x", "--url", "localhost:8000"], ("url: got", "http://")),
        (["chat", "-m", "", "--url", NOBODY], ("message: got ''",)),
        (["bench", "--url", NOBODY], (NOBODY, "reft serve", "--url")),
        (["bench", "--url", NOBODY, "--prompts", "/no"], ("prompts: got '/no'",)),
        (["adapter", "push", "/no/file", "--key", "x"], ("/no/file",)),
        (["adapter", "inspect", "/no/file"], ("/no/file", "No such file")),
    ],
)
def test_values(args, mentions):
    line = one_line(1, *args, env={"REFT_PORT": "0"} if args[0] == "serve" else None)
    for mention in mentions:
        assert mention in line


def test_a_port_in_use_is_found_before_the_model_loads(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = one_line(1, "serve", "--port", port, "--data-dir", str(tmp_path))
    assert f"port: got {port}" in line
    assert "in use" in line


def test_an_address_of_another_machine(tmp_path):
    env = {"REFT_API_KEY": "long-enough"}
    args = ("serve", "--host", "192.0.2.7", "--port", "0", "--data-dir", str(tmp_path))
    assert "an address of this machine" in one_line(1, *args, env=env)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    line = one_line(1, "serve", "--port", "0", "--data-dir", str(tmp_path))
    assert "no permission to write there" in line
    assert "--data-dir" in line


def test_a_model_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = ("serve", "--port", "0", "--data-dir", str(tmp_path / "d"), "--model", "/no/model")
    result = runner.invoke(app, list(args))
    assert result.exit_code == 1
    assert "/no/model" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "mention"),
    [
        (["chat", "-m", "x", "--key", "wrong-key"], "REFT_API_KEY"),
        (["bench", "--key", "wrong-key"], "REFT_API_KEY"),
        (["chat", "-m", "x", "--key", "right-key", "--model", "toone"], "did you mean 'tone'"),
        (["bench", "--key", "right-key", "-m", "nobody"], "nobody"),
    ],
)
def test_against_a_server(on_socket, args, mention):
    with on_socket(api_key="right-key") as server:
        server.upload("tone", make_adapter(1))
        assert mention in one_line(1, *args, "--url", server.url)


def test_a_wrong_file_and_a_wrong_admin_key(live, tmp_path: Path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no adapter")
    good = tmp_path / "good.safetensors"
    good.write_bytes(make_adapter(1))
    to = ("--url", live.url, "--key")
    assert "body" in one_line(1, "adapter", "push", str(bad), "--name", "bad", *to, ADMIN_KEY)
    assert "key" in one_line(1, "adapter", "push", str(good), *to, "wrong-key-wrong-key")


def test_help_is_there_for_everything():
    for args in ([], ["serve"], ["chat"], ["bench"], ["config"], ["config", "show"], ["adapter"]):
        result = runner.invoke(app, [*args, "--help"], env={"COLUMNS": "100"})
        assert result.exit_code == 0
        assert "Usage" in result.output
    assert "--install-completion" in runner.invoke(app, ["--help"]).output


def test_completion_knows_commands_and_values():
    env = {
        "_REFT_COMPLETE": "complete_bash",
        "COMP_WORDS": "reft serve --dtype b",
        "COMP_CWORD": "3",
    }
    result = runner.invoke(app, [], env=env, prog_name="reft")
    assert result.output.split() == ["bfloat16"]


def test_no_flag_is_cut_short_where_a_terminal_is_narrow():
    told = runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "80"}).output
    missing = [f.flag for f in all_fields().values() if f.flag and f.flag not in told]
    assert missing == []
    assert "…" not in told
    for negative in ("--no-cuda-graphs", "--no-inline-adapters"):
        assert negative in told


@pytest.mark.parametrize(
    ("path", "mention"),
    [("none", "adapters: got"), ("bad.safetensors", "body: not a"), ("folder", "body: not a")],
)
def test_a_bad_adapter_file_is_found_before_the_model_loads(tmp_path, monkeypatch, path, mention):
    monkeypatch.setattr("server.engines.load_base_model", lambda settings: pytest.fail("loaded"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "good.safetensors").write_bytes(make_adapter(1))
    for place in ("bad.safetensors", "folder/late.safetensors"):
        (tmp_path / place).write_bytes(make_adapter(1)[:-9])
    args = ("serve", "--port", "0", "--data-dir", str(tmp_path / "data"))
    line = one_line(1, *args, "--adapter", str(tmp_path / path))
    assert mention in line
    assert str(tmp_path / path) in line

"""Settings of flags, environment and file: who wins, who is named, and what is refused."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from reft_core.errors import InvalidRequest
from server.cli.main import app
from server.settings import Settings
from server.settings.fields import all_fields
from server.settings.file import example, read_settings_file
from server.settings.sources import load_settings

runner = CliRunner()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path, monkeypatch):
    file = write(tmp_path / "reft.yaml", "port: 1\nmax_n: 2\nmax_stop: 3\n")
    monkeypatch.setenv("REFT_MAX_N", "4")
    monkeypatch.setenv("REFT_PORT", "5")
    found = load_settings(file, {"port": "6"})
    settings, sources = found.settings, found.sources
    assert (settings.port, settings.max_n, settings.max_stop) == (6, 4, 3)
    wanted = {
        "port": "flag",
        "max_n": "environment",
        "max_stop": "file",
        "max_stop_chars": "default",
    }
    assert {name: sources[name] for name in wanted} == wanted
    assert set(sources) == set(Settings.model_fields)


def test_toml_reads_the_same(tmp_path):
    file = write(tmp_path / "reft.toml", 'port = 7\npinned_adapters = ["a", "b"]\n')
    settings = load_settings(file).settings
    assert (settings.port, settings.pinned_adapters) == (7, ("a", "b"))


def test_paths_in_a_file_count_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    text = "data_dir: store\nadapters: [a.safetensors, /b]\nmodel: ./base\n"
    settings = load_settings(write(tmp_path / "reft.yaml", text)).settings
    assert settings.data_dir == tmp_path / "store"
    assert settings.adapters == (tmp_path / "a.safetensors", Path("/b"))
    assert Path(settings.model) == tmp_path / "base"
    hub = load_settings(write(tmp_path / "reft.yaml", "model: owner/name")).settings
    assert hub.model == "owner/name"


@pytest.mark.parametrize(
    ("name", "text", "mentions"),
    [
        ("reft.yaml", "prot: 8000", ("'prot' is no setting", "did you mean 'port'")),
        ("reft.yaml", "max-model-len: 9", ("'max-model-len'", "'max_model_len'")),
        ("reft.yaml", "zzzz: 1", ("'zzzz'", "reft config init")),
        ("reft.yaml", "port: 99999", ("port: got 99999", "from 0 to 65535", "reft.yaml")),
        ("reft.yaml", "port:", ("port: got None", "from 0 to 65535")),
        ("reft.yaml", "dtype: int3", ("dtype: got 'int3'", "float32, bfloat16, float16")),
        ("reft.yaml", "max_body_bytes: 1", ("max_body_bytes: got 1", "at least 1024")),
        ("reft.yaml", "request_timeout_s: 0", ("request_timeout_s: got 0", "above 0")),
        ("reft.yaml", "- a\n- b", ("setting: value",)),
        ("reft.yaml", "port: 1\nport: 2", ("'port' is there twice",)),
        ("reft.yaml", "port: [", ("valid YAML",)),
        ("reft.toml", "port = ", ("valid TOML",)),
        ("reft.ini", "", (".yaml, .yml, .toml",)),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_that_names_it(tmp_path, name, text, mentions):
    with pytest.raises(InvalidRequest) as caught:
        load_settings(write(tmp_path / name, text))
    message = caught.value.message
    assert "\n" not in message
    for mention in mentions:
        assert mention in message


def test_a_wrong_value_says_which_variable_or_flag_it_came_from(monkeypatch):
    with pytest.raises(InvalidRequest, match=r"\(from --max-n\)"):
        load_settings(flags={"max_n": "0"})
    monkeypatch.setenv("REFT_MAX_N", "many")
    with pytest.raises(InvalidRequest, match=r"got 'many'.*\(from REFT_MAX_N\)"):
        load_settings()


def test_a_secret_that_is_refused_is_not_repeated(tmp_path):
    with pytest.raises(InvalidRequest) as caught:
        load_settings(write(tmp_path / "reft.yaml", "admin_key: hunter2"))
    assert "hunter2" not in caught.value.message
    assert "admin_key: got '7 characters (hidden)'" in caught.value.message
    assert "at least 16 characters" in caught.value.message


@pytest.mark.parametrize(
    ("given", "mention"),
    [
        ('compilation_config={"level":3,"x":1}', "expected one JSON object"),
        ("block_size=32,enforce_eager=true", "expected one JSON object"),
        ('{"block_size": 32, "block_size": 16}', "each name once, and not block_size twice"),
        (["block_size=32", "block_size=16"], "each name once, and not block_size twice"),
        (["hf_token=hunter2", "block_size"], "got 'hf_token=…, block_size', expected name=value"),
        (["hf_token=hunter2"], "vllm_args: got 'hf_token=…', expected nothing with engine"),
        ('{"hf_token": "hunter2"', "got '22 characters', expected one JSON object"),
    ],
)
def test_what_is_wrong_with_arguments_of_vllm_is_said_without_secrets(given, mention):
    with pytest.raises(InvalidRequest) as caught:
        load_settings(flags={"vllm_args": given})
    assert mention in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("form", ["variable", "flags"])
def test_arguments_of_vllm_are_json(monkeypatch, form):
    arguments = {"compilation_config": {"level": 3, "x": 1}, "hf_token": "abc"}
    if form == "variable":
        monkeypatch.setenv("REFT_VLLM_ARGS", json.dumps(arguments))
        settings = load_settings(flags={"engine": "vllm"}).settings
    else:
        flags = ['compilation_config={"level":3,"x":1}', "hf_token=abc"]
        settings = load_settings(flags={"engine": "vllm", "vllm_args": flags}).settings
    assert settings.vllm_options().extra == arguments


def test_a_variable_that_is_a_setting_misspelt_is_a_warning(monkeypatch):
    monkeypatch.setenv("REFT_MAX_MODEL_LENGTH", "9")
    monkeypatch.setenv("REFT_URL", "http://x")
    (warning,) = load_settings().warnings
    assert "REFT_MAX_MODEL_LENGTH" in warning
    assert "'max_model_len'" in warning


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InvalidRequest, match="No such file"):
        read_settings_file(tmp_path / "none.yaml")


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
def test_the_example_names_every_setting_and_means_the_defaults(tmp_path, suffix):
    text = example(suffix)
    read = yaml.safe_load if suffix == ".yaml" else tomllib.loads
    assert not read(text)
    assign = ":" if suffix == ".yaml" else " ="
    names = []
    for name, field in all_fields().items():
        (line,) = re.findall(rf"^# ({name}{assign}.*)$", text, re.MULTILINE)
        names.append(name)
        if not field.is_secret and field.default is not None:
            assert getattr(Settings(**read(line)), name) == field.default
    assert names == list(Settings.model_fields)


# The commands ---------------------------------------------------------------------------------


def run(*args: str, env: dict[str, str] | None = None):
    return runner.invoke(app, list(args), env={"COLUMNS": "120"} | (env or {}))


def test_show_prints_values_with_their_sources_and_hides_secrets(tmp_path):
    file = write(tmp_path / "reft.yaml", "max_n: 3\n")
    env = {"REFT_API_KEY": "secret-secret", "REFT_CONFIG": str(file)}
    shown = run("config", "show", "--port", "99", env=env)
    assert shown.exit_code == 0, shown.output
    rows = dict(re.findall(r"│ (\w+) +│ .*? │ (\w+) +│", shown.output))
    assert (rows["port"], rows["api_key"], rows["max_n"]) == ("flag", "environment", "file")
    assert rows["host"] == "default"
    assert "set (hidden)" in shown.output
    listed = json.loads(run("config", "show", "--json", env=env).output)
    assert listed["api_key"] == {"value": "set (hidden)", "source": "environment"}
    assert listed["admin_key"] == {"value": None, "source": "default"}
    assert listed["max_n"] == {"value": 3, "source": "file"}
    assert "secret-secret" not in shown.output + json.dumps(listed)


def test_show_hides_what_arguments_of_vllm_call_secret():
    nested = 'other={"api_key": "hunter2", "keys": [1], "tokenizer": "plain"}'
    flags = ("hf_token=hunter2", "long_prefill_token_threshold=64", "tokenizer_mode=slow", nested)
    args = [part for flag in flags for part in ("--vllm-args", flag)]
    shown = run("config", "show", "--engine", "vllm", *args, env={"COLUMNS": "400"})
    assert shown.exit_code == 0, shown.output
    listed = run("config", "show", "--engine", "vllm", "--json", *args)
    assert "hunter2" not in shown.output + listed.output
    assert json.loads(listed.output)["vllm_args"]["value"] == [
        "hf_token=…",
        *flags[1:3],
        'other={"api_key": "…", "keys": [1], "tokenizer": "plain"}',
    ]


def test_init_writes_a_file_that_show_takes(tmp_path):
    path = tmp_path / "my.toml"
    assert run("config", "init", str(path)).exit_code == 0
    assert run("config", "show", "--config", str(path)).exit_code == 0
    again = run("config", "init", str(path))
    assert again.exit_code == 1
    assert "--force" in again.output
    assert run("config", "init", str(path), "--force").exit_code == 0


def test_every_setting_is_a_flag_but_secrets():
    shown = runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for field in all_fields().values():
        assert (field.flag is None) == field.is_secret
        if field.flag is not None:
            assert f"{field.flag} " in shown or f"{field.flag}/" in shown, field.name
    assert "--api-key" not in shown


def test_passwords_in_urls_are_not_shown():
    field = all_fields()["model"]
    for shown in (field.shown, field.plain):
        assert shown("postgresql://me:secret@db:5432/x") == "postgresql://me:…@db:5432/x"
        assert shown("http://db:5432/x@y") == "http://db:5432/x@y"


def test_switches_and_lists_are_flags_too():
    args = ["--no-cuda-graphs", "-a", "x", "--adapter", "y"]
    shown = json.loads(run("config", "show", "--json", *args).output)
    assert shown["cuda_graphs"] == {"value": False, "source": "flag"}
    assert shown["adapters"]["value"] == ["x", "y"]
    assert json.loads(run("config", "show", "--json").output)["cuda_graphs"]["source"] == "default"

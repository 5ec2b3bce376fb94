from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_core.adapter import read_adapter
from server.cli.main import app
from tests.server.fakes import make_adapter

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE = ["--base", str(FIXTURES / "base"), "--template", "base"]
PYREFT = str(FIXTURES / "pyreft" / "loreft-tied" / "adapter")
PEFT = str(FIXTURES / "peft" / "lora" / "adapter")

runner = CliRunner()


def run(*args: str):
    return runner.invoke(app, ["adapter", *args])


def convert(source: str, kind: str, out: Path, *options: str):
    return run("convert", source, "--from", kind, *BASE, "--out", str(out), *options)


def failed(result, mention: str) -> None:
    assert result.exit_code == 1, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ")
    assert mention in lines[0]


def test_a_peft_folder_there_and_back(tmp_path):
    out, folder = tmp_path / "a.safetensors", tmp_path / "peft"
    made = convert(PEFT, "peft", out, "--name", "tone", "--description", "d", "--licence", "MIT")
    assert made.exit_code == 0, made.output
    adapter = read_adapter(out)
    assert made.output.startswith(f"tone: lora; {adapter.spec.num_parameters:,} parameters")
    assert adapter.digest in made.output
    assert (adapter.spec.description, adapter.spec.licence) == ("d", "MIT")
    exported = run("export", str(out), "--to", "peft", "--out", str(folder))
    assert exported.exit_code == 0, exported.output
    assert "LORA" in exported.output
    again = tmp_path / "b.safetensors"
    assert convert(str(folder), "peft", again, "--name", "tone").exit_code == 0
    assert read_adapter(again).spec.sites == adapter.spec.sites


def test_every_option_reaches_the_converter(tmp_path):
    out = tmp_path / "a.safetensors"
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"user": "Q: {content}", "generation": "A:"}))
    result = run(
        *("convert", PYREFT, "--from", "pyreft", "--base", BASE[1], "--out", str(out)),
        *("--name", "x", "--positions", "f3+l2", "--tied", "--anchor", "before_last"),
        *("--cap", "half", "--method", "loreft", "--activation", "identity", "--phase", "prompt"),
        *("--template", str(template), "--strength", "0.5", "--dtype", "bfloat16"),
        *("--subspaces", "tone=0:2,topic=3"),
    )
    assert result.exit_code == 0, result.output
    spec = read_adapter(out).spec
    positions = spec.positions
    assert (positions.rule, positions.tied, positions.anchor) == ("f3+l2", True, "before_last")
    assert (positions.cap, spec.method, spec.strength) == ("half", "loreft", 0.5)
    assert spec.dtype == "bfloat16"
    assert spec.subspaces == {"tone": (0, 1), "topic": (3,)}
    assert spec.template is not None
    assert (spec.template.user, spec.template.generation) == ("Q: {content}", "A:")
    folder = tmp_path / "pyreft"
    assert run("export", str(out), "--to", "pyreft", "--out", str(folder)).exit_code == 0
    assert (folder / "config.json").is_file()


def test_a_broken_rotation_is_mentioned(tmp_path):
    source = str(FIXTURES / "pyreft" / "consreft-decayed" / "adapter")
    known = ["--name", "x", "--positions", "f2+l2", "--anchor", "prompt_end", "--cap", "half"]
    result = convert(source, "pyreft", tmp_path / "a.safetensors", *known)
    assert result.exit_code == 0, result.output
    assert "far from orthonormal" in result.output


def test_a_prefix_that_may_have_been_hidden_is_mentioned(tmp_path):
    source = str(FIXTURES / "adapterhub" / "prefix-pickle" / "adapter")
    result = convert(source, "adapters", tmp_path / "a.safetensors")
    assert result.exit_code == 0, result.output
    assert "eager attention" in result.output
    lora = str(FIXTURES / "adapterhub" / "lora" / "adapter")
    assert "note" not in convert(lora, "adapters", tmp_path / "b.safetensors").output


def test_an_existing_file_is_replaced_on_request_only(tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_text("precious")
    failed(convert(PEFT, "peft", out, "--name", "x"), "--force replaces")
    assert out.read_text() == "precious"
    assert convert(PEFT, "peft", out, "--name", "x", "--force").exit_code == 0
    assert read_adapter(out).spec.name == "x"


@pytest.mark.parametrize(
    ("source", "kind", "options", "mention"),
    [
        (PEFT, "zip", [], "from: got 'zip', expected one of pyreft, adapters, peft, easysteer"),
        (PEFT, "peft", [], "name: got None, expected letters"),
        (PEFT, "peft", ["--name", "a b"], "name: got 'a b'"),
        (PEFT, "peft", ["--name", "x", "--phase", "never"], "phase: got 'never'"),
        (PEFT, "peft", ["--name", "x", "--layers", "1,a"], "layers: got '1,a'"),
        (PEFT, "peft", ["--name", "x", "--template", "/none.json"], "template: got '/none.json'"),
        (
            PEFT,
            "peft",
            ["--name", "x", "--subspaces", "a=4"],
            "subspaces.a: got [4], expected",
        ),
        (
            PEFT,
            "peft",
            ["--name", "x", "--subspaces", "a:4"],
            "subspaces: got 'a:4', expected",
        ),
        (PEFT, "peft", ["--name", "x", "--dtype", "int4"], "dtype: got 'int4'"),
        (PEFT, "pyreft", ["--name", "x"], "config.json"),
        (PYREFT, "pyreft", ["--name", "x"], "activation: got None"),
        ("/does/not/exist", "peft", ["--name", "x"], "/does/not/exist"),
    ],
)
def test_failures_are_one_clear_line_and_leave_no_file(tmp_path, source, kind, options, mention):
    out = tmp_path / "a.safetensors"
    failed(convert(source, kind, out, *options), mention)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_template_or_base_is_one_clear_line(tmp_path):
    template = tmp_path / "t.json"
    template.write_text('{"user": "no slot"}')
    known = ["--name", "x", "--out", str(tmp_path / "a")]
    bad = run("convert", PEFT, "--from", "peft", *BASE[:2], *known, "--template", str(template))
    failed(bad, "{content}")
    bad = run("convert", PEFT, "--from", "peft", "--base", str(tmp_path / "none"), *known)
    failed(bad, "base: got")


def test_export_failures_are_one_clear_line(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(make_adapter(1))
    out = tmp_path / "out"
    failed(run("export", str(path), "--to", "zip", "--out", str(out)), "to: got 'zip'")
    failed(run("export", str(path), "--to", "peft", "--out", str(out)), "positions: got 'l2")
    failed(run("export", str(path), "--to", "peft", "--out", str(tmp_path)), "does not exist yet")
    path.write_bytes(b"nothing")
    failed(run("export", str(path), "--to", "peft", "--out", str(out)), "body")
    assert not out.exists()

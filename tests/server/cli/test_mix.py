from __future__ import annotations

import pytest
from typer.testing import CliRunner

from reft_core.adapter import read_adapter
from server.cli.main import app
from tests.factories import random_adapter_bytes, tiny_description

runner = CliRunner()


@pytest.fixture
def files(tmp_path):
    """Two adapter files, the second with a strength of its own."""
    model = tiny_description()
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.write_bytes(random_adapter_bytes(model, seed=1, name="a"))
    second.write_bytes(random_adapter_bytes(model, seed=2, name="b", strength=0.25))
    return first, second


def run(*args):
    return runner.invoke(app, ["adapter", "mix", *map(str, args)])


def test_strengths_are_those_given_or_the_files_own(files, tmp_path):
    out = tmp_path / "both.safetensors"
    result = run(f"{files[0]}:0.7", files[1], "--out", out)
    assert result.exit_code == 0, result.output
    adapter = read_adapter(out)
    assert adapter.spec.name == "both"
    assert adapter.spec.description == "Mixed from a at 0.7, b at 0.25"
    assert adapter.spec.strength == 1
    assert adapter.digest in result.output


@pytest.mark.parametrize(
    ("suffix", "mention"),
    [(":much", "strength: got 'much'"), (":nan", "strength"), ("x", "FILE:STRENGTH")],
)
def test_a_bad_part_is_named(files, tmp_path, suffix, mention):
    out = tmp_path / "both.safetensors"
    result = run(f"{files[0]}{suffix}", files[1], "--out", out)
    assert result.exit_code == 1
    assert mention in result.output
    assert not out.exists()


def test_a_file_is_replaced_only_when_told(files, tmp_path):
    out = tmp_path / "both.safetensors"
    assert run(*files, "--out", out).exit_code == 0
    assert run(*files, "--out", out).exit_code == 1
    assert run(*files, "--out", out, "--force", "--name", "again").exit_code == 0
    assert read_adapter(out).spec.name == "again"

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_core.convert import METHODS_IN
from reft_core.methods import METHODS
from reft_core.methods.virtual import VIRTUAL_METHODS
from server.cli.main import app

DOCS = Path(__file__).parents[3] / "docs" / "methods.md"

runner = CliRunner()


@pytest.fixture(scope="module")
def markdown() -> str:
    result = runner.invoke(app, ["methods", "--markdown"])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_documentation_is_up_to_date(markdown):
    assert DOCS.read_text() == markdown, "run: reft methods --markdown > docs/methods.md"


def test_every_method_has_a_row_that_names_its_facts(markdown):
    rows = {
        cells[0].strip("` "): cells
        for line in markdown.splitlines()
        if line.startswith("| `")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert set(rows) == {*METHODS, *VIRTUAL_METHODS}
    for name, method in METHODS.items():
        assert method.equation in rows[name]
        assert method.citation in rows[name]
        assert method.phase in rows[name]
    for kind, names in METHODS_IN.items():
        assert {name for name in rows if kind in rows[name][6].split(", ")} == names


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("loreft", 30 * (576 * 8 + 8 * 576 + 8)),  # R, W, b
        ("red", 30 * 2 * 576),
        ("steering", 30 * 576),
        ("lora", 30 * (8 * (576 + 576) + 8 * (576 + 192))),  # q_proj and v_proj
        ("bitfit", 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)),
        ("prefix_tuning", 8 * 30 * 2 * 3 * 64),
        ("prompt_tuning", 8 * 576),
    ],
)
def test_parameters_are_those_one_counts_by_hand(markdown, name, count):
    row = next(line for line in markdown.splitlines() if line.startswith(f"| `{name}`"))
    assert f"| {count:,} ({100 * count / 134_515_008:.3f} %) |" in row


def test_the_table_for_a_terminal():
    result = runner.invoke(app, ["methods"], env={"COLUMNS": "240"})
    assert result.exit_code == 0
    for name, method in METHODS.items():
        assert name in result.output
        assert method.equation in result.output


def test_one_method_on_the_papers_axes():
    result = runner.invoke(app, ["methods", "mam"])
    assert result.exit_code == 0, result.output
    assert result.output.count("composition function:") == 2
    assert "insertion form:           parallel" in result.output


def test_an_unknown_method_ends_in_one_line():
    result = runner.invoke(app, ["methods", "ia3"])
    assert result.exit_code == 1
    assert "method: got 'ia3'" in result.output


def test_an_adapter_on_the_papers_axes():
    file = DOCS.parents[1] / "examples" / "sentiment" / "sentiment.safetensors"
    result = runner.invoke(app, ["adapter", "describe", str(file)])
    assert result.exit_code == 0, result.output
    assert "sentiment: loreft at positions l1" in result.output
    assert "(h·down + bias)·up [rank 4]" in result.output
    assert "insertion form:           sequential" in result.output

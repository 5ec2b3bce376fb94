"""The table of runs, from the command that fills it to the one that shows it."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reft_core.errors import InvalidRequest
from server.cli.main import app
from tests.trainer.factories import byte_model, make_config
from trainer import causal, cli, preparing
from trainer.paths import RUNS_FILE
from trainer.runs import Run, add_run, find_run, read_runs


def made(number: int, **fields: object) -> Run:
    values = {
        "id": f"{number:08x}",
        "state": "finished",
        "started_at": f"2026-01-{number + 1:02}T10:00:00+00:00",
        "seconds": 10 - number,
        "command": "reft train a.jsonl",
        "name": "a",
        "base": "tiny",
        "method": "loreft",
        "path": "runs/a/a.safetensors",
    }
    return Run.model_validate(values | fields)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["runs", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_training_adds_a_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "load_any", lambda *_, **__: byte_model())
    document = make_config(here, epochs=1).model_dump(mode="json", exclude_defaults=True)
    config = here / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    cli.train_command(config, ["labels=[y,n]"])
    with pytest.raises(SystemExit):
        cli.train_command(config, ["learning_rate=1e6", "--rank", "33"])
    monkeypatch.setattr(causal.CausalTask, "evaluate", _interrupt)
    with pytest.raises(SystemExit):
        cli.train_command(config, [])
    (finished, failed, interrupted), num_bad = read_runs(here / RUNS_FILE)
    assert num_bad == 0
    assert finished.state == "finished"
    assert finished.metric == "test_exact_match"
    assert finished.value == finished.metrics["test_exact_match"]
    assert finished.base_value == 0
    assert finished.path == "out/tiny.safetensors"
    assert finished.data == "train.jsonl"
    assert finished.layers == {"block_output": [0, 1, 2]}
    assert finished.command == f"reft train {config} 'labels=[y,n]'"
    assert (failed.state, failed.rank, failed.digest) == ("failed", 33, None)
    assert failed.error is not None
    assert failed.error.startswith("rank: got 33")
    assert interrupted.state == "interrupted"
    shown = run("show", "tiny")
    assert "interrupted" in shown
    assert json.loads(run("show", finished.id, "--json"))["digest"] == finished.digest


def test_a_table_that_cannot_be_written_hides_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.setattr(preparing, "load_any", lambda *_, **__: byte_model())
    document = make_config(here, epochs=1).model_dump(mode="json", exclude_defaults=True)
    config = here / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    (here / "taken").write_text("")
    table = "runs_file=taken/runs.jsonl"  # below a file
    with pytest.raises(SystemExit):
        cli.train_command(config, [table, "--rank", "33"])
    assert "error: rank: got 33" in capsys.readouterr().err
    result = cli.train_command(config, [table])
    assert result.adapter.digest in capsys.readouterr().out
    assert caplog.text.count("runs_file: the run is not in the table") == 2


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_table_may_be_another_or_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "load_any", lambda *_, **__: byte_model())
    document = make_config(here, epochs=1).model_dump(mode="json", exclude_defaults=True)
    config = here / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    cli.train_command(config, ["runs_file=null"])
    assert not (here / RUNS_FILE).exists()
    cli.train_command(config, ["runs_file=all.jsonl"])
    assert len(read_runs(here / "all.jsonl")[0]) == 1
    assert "tiny" in run("--file", "all.jsonl")


def test_runs_are_listed_sorted_and_chosen(here: Path) -> None:
    assert run() == ""  # the note is no output
    numbers = {0: (0.5, "b/x.jsonl"), 1: (0.9, "b/y.jsonl"), 2: (None, "c.jsonl")}
    for number, (value, data) in numbers.items():
        state = "failed" if value is None else "finished"
        add_run(RUNS_FILE, made(number, value=value, data=data, state=state))

    def ids(*args: str) -> list[int]:
        return [int(found["id"], 16) for found in json.loads(run("--json", *args))]

    assert ids() == [2, 1, 0]
    assert ids("--sort", "value") == [1, 0, 2]
    assert ids("--sort", "seconds") == [2, 1, 0]
    assert ids("--data", "b/") == [1, 0]
    assert ids("--state", "failed") == [2]
    assert ids("--base", "other") == []
    table = run()
    assert table.index("00000002") < table.index("00000000")
    refused = CliRunner().invoke(app, ["runs", "--sort", "size"])
    assert refused.exit_code == 1
    assert "sort: got 'size'" in refused.output
    refused = CliRunner().invoke(app, ["runs", "--state", "fail"])
    assert refused.exit_code == 1
    assert "state: got 'fail', expected one of finished, failed" in refused.output


def test_a_strangers_table_cannot_steer_a_terminal(here: Path) -> None:
    add_run(RUNS_FILE, made(1, name="\x1b[31mred [bold]"))
    for shown in (run(), run("show", "00000001")):
        assert "\x1b[31m" not in shown
        assert "[bold]" in shown


def test_half_a_line_loses_itself_alone(here: Path) -> None:
    add_run(RUNS_FILE, made(1))
    whole = RUNS_FILE.read_bytes()
    RUNS_FILE.write_bytes(whole + whole[:20])
    add_run(RUNS_FILE, made(2))
    found, num_bad = read_runs(RUNS_FILE)
    assert [each.id for each in found] == ["00000001", "00000002"]
    assert num_bad == 1


def test_runs_that_end_at_once_are_all_there(here: Path) -> None:
    workers = [
        multiprocessing.get_context("fork").Process(target=_add_many, args=(start,))
        for start in range(0, 40, 10)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found, num_bad = read_runs(RUNS_FILE)
    assert num_bad == 0
    assert sorted(int(each.id, 16) for each in found) == list(range(40))


def _add_many(start: int) -> None:
    for number in range(start, start + 10):
        add_run(RUNS_FILE, made(number % 9, id=f"{number:08x}", error="x" * 9000))


def test_a_run_is_found_by_name_id_or_its_beginning() -> None:
    runs = [made(1), made(2), made(3, name="b")]
    assert find_run(runs, "a").id == "00000002"
    assert find_run(runs, "00000001").id == "00000001"
    long = [made(4, id="beef1234"), made(5, id="beef5678")]
    assert find_run(long, "beef1").id == "beef1234"
    assert find_run(long, "beef").id == "beef5678", "the newest"
    for wanted in ("c", "bee"):  # three letters are no beginning
        with pytest.raises(InvalidRequest, match=f"run: got '{wanted}', expected"):
            find_run([*runs, *long], wanted)

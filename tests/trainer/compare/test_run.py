"""Whole comparisons on a tiny random llama over bytes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from reft_core.adapter import decode_adapter
from reft_core.errors import TrainingError
from tests.trainer.compare.factories import tiny_comparison
from tests.trainer.factories import byte_model, label_rows, make_config, write_rows
from trainer.compare import causal, runner
from trainer.compare.answering import answer_by_model
from trainer.compare.answers import Answers
from trainer.compare.arena import arena_for
from trainer.compare.cli import print_table
from trainer.compare.contenders import CONTENDERS
from trainer.compare.render import to_csv, to_latex, to_markdown
from trainer.compare.report import write_report
from trainer.compare.run import Comparison, compare
from trainer.compare.store import Job, Store
from trainer.compare.table import table_rows
from trainer.compare.task import Task, fit_on, load_task, load_test
from trainer.config import TrainConfig
from trainer.fit import FitResult, diverged
from trainer.task import TrainedModel

LABELS = {"labels": ("y", "n"), "epochs": 2, "positions": "prompt"}


def run(config: TrainConfig, folder: Path, **fields: object) -> Comparison:
    return compare(config, tiny_comparison(folder, **fields), loaded=byte_model(), command="c")


def test_a_comparison_of_every_kind_ends_in_a_table(tmp_path: Path) -> None:
    methods = ("zero_shot", "few_shot", "head_only", "peft_lora", "loreft", "full_finetuning")
    config = make_config(tmp_path, **LABELS)
    found = run(config, tmp_path, methods=methods, seeds=(0, 1), reference="peft_lora")
    rows = {row.method: row for row in table_rows(found)}
    assert list(rows) == list(methods)
    assert all(row.quality and not row.error for row in rows.values())
    assert rows["zero_shot"].num_seeds == 1
    assert rows["loreft"].num_seeds == 2
    assert rows["zero_shot"].num_parameters == rows["few_shot"].file_bytes == 0
    assert rows["full_finetuning"].percent_of_base == pytest.approx(100)
    assert rows["loreft"].serving_scope == "prompt"
    assert rows["peft_lora"].serving_scope == "every token"
    assert rows["peft_lora"].difference is None
    assert rows["loreft"].difference is not None
    quality, difference = rows["loreft"].quality, rows["loreft"].difference
    other = rows["peft_lora"].quality
    assert quality is not None
    assert other is not None
    assert difference is not None
    assert difference.value == pytest.approx(quality.value - other.value)
    assert quality.low <= quality.value <= quality.high

    write_report(found, list(rows.values()), "reft compare tiny.yaml")
    folder = tmp_path / "compared"
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert "| LoReFT |" in report
    assert "reft compare tiny.yaml" in report
    table = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in table] == list(methods)
    assert float(table[4]["value"]) == quality.value
    latex = (folder / "table.tex").read_text()
    assert latex.count(r"\\") == 1 + len(methods)
    assert "_" not in latex.replace(r"\_", "")
    assert json.loads((folder / "report.json").read_text())["rows"][4]["method"] == "loreft"
    assert to_csv([]).count("\n") == 1
    assert to_latex(found, []).count(r"\\") == 1


def test_serving_is_measured_beside_the_base(tmp_path: Path) -> None:
    config = make_config(tmp_path, **LABELS)
    methods = ("zero_shot", "loreft", "peft_lora", "peft_prompt_tuning", "full_finetuning")
    found = run(config, tmp_path, methods=methods, measure_serving=3)
    rows = {row.method: row for row in table_rows(found)}
    for name in ("loreft", "peft_lora", "peft_prompt_tuning"):
        for spread in (rows[name].first_token, rows[name].speed):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert not rows["zero_shot"].first_token
    report = to_markdown(found, list(rows.values()), "")
    assert "| first token, × base | tokens/s, × base |" in report
    assert "| own weights | own weights |" in report
    assert "Measured: 3 prompts" in report
    kept = tmp_path / "compared" / "results" / "final" / "loreft"
    (path,) = kept.glob("*.safetensors")
    assert decode_adapter(path.read_bytes()).spec.method == "loreft"


def test_a_rerun_computes_nothing_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, **LABELS)
    first = run(config, tmp_path, methods=("red", "zero_shot"), search=2)

    def computing(*_: object, **__: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(runner.Runner, "run", computing)
    again = run(config, tmp_path, methods=("red", "zero_shot"), search=2)
    assert table_rows(first) == table_rows(again)


def test_the_best_setting_on_validation_is_the_one_that_is_tested(tmp_path: Path) -> None:
    config = make_config(tmp_path, **LABELS)
    found = run(config, tmp_path, methods=("loreft",), search=3)
    folder = tmp_path / "compared" / "results" / "search" / "loreft"
    trials = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert len(trials) == 3
    assert all("test" not in trial and "answers" not in trial for trial in trials)

    def quality(trial: dict) -> tuple[float, float]:
        return trial["valid"]["likelihood_accuracy"], -trial["valid"]["loss"]

    best = max(trials, key=quality)
    assert found.chosen["loreft"] == best["setting"]
    assert found.finals["loreft"][0]["setting"] == best["setting"]
    # The final run of the search's seed is that trial again.
    assert found.finals["loreft"][0]["valid_losses"] == best["valid_losses"]


def test_no_test_row_is_read_before_all_settings_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, **LABELS)
    (tmp_path / "test.jsonl").unlink()
    methods = ("red", "few_shot")
    with pytest.raises(TrainingError, match=r"test\.jsonl: cannot be read"):
        run(config, tmp_path, methods=methods, search=2)
    done = sorted(p.parent.name for p in (tmp_path / "compared" / "results").rglob("*.json"))
    assert done == ["few_shot", "few_shot", "red", "red"]
    write_rows(tmp_path / "test.jsonl", label_rows(60, 6))
    assert len(run(config, tmp_path, methods=methods, search=2).finals) == 2


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exploding(*_: object, **__: object) -> None:
        raise diverged("the loss became nan at step 3")

    monkeypatch.setattr(runner, "fit_on", exploding)
    found = run(make_config(tmp_path, **LABELS), tmp_path, methods=("red", "zero_shot"))
    red, zero = table_rows(found)
    assert found.finals["red"][0]["status"] == "failed"
    assert red.quality is None
    assert "learning_rate" in red.error
    assert zero.quality is not None
    assert "Runs that failed" in to_markdown(found, [red, zero], "")


def test_how_much_was_tried_and_which_runs_failed_is_told_of_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_times(task: Task, config: TrainConfig, model: TrainedModel) -> FitResult:
        if config.seed == 1 and config.method == "red":
            raise diverged("the loss became nan at step 3")
        return fit_on(task, config, model)

    monkeypatch.setattr(runner, "fit_on", at_times)
    given = {"settings": {"red": {"learning_rate": 0.01}}, "search": 2, "seeds": (0, 1)}
    config = make_config(tmp_path, **LABELS | {"epochs": 1})
    found = run(config, tmp_path, methods=("red", "loreft"), **given)
    rows = table_rows(found)
    assert [(row.num_tried, row.num_seeds) for row in rows] == [(1, 1), (2, 2)]
    report = to_markdown(found, rows, "")
    assert "| method | setting | tried | seeds |" in report
    assert "| RED | – | 1 | 1 |" in report
    assert "up to 2 settings a method" in report
    terminal = io.StringIO()
    print_table(found, rows, Console(file=terminal, width=200))
    (line,) = [line for line in terminal.getvalue().splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: RED: ")
    assert "nan at step 3" in line


def test_a_run_without_memory_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[bool] = []

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(runner, "fit_on", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    found = run(make_config(tmp_path, **LABELS), tmp_path, methods=("red", "zero_shot"))
    red, zero = table_rows(found)
    assert "out of memory" in red.error
    assert zero.quality is not None
    assert emptied == [True]


def test_results_of_another_task_are_not_mixed_in(tmp_path: Path) -> None:
    config = make_config(tmp_path, **LABELS)
    run(config, tmp_path, methods=("zero_shot",))
    write_rows(tmp_path / "train.jsonl", label_rows(0, 30))
    with pytest.raises(TrainingError, match=r"train_rows: got 30, expected 40 as the results in"):
        run(config, tmp_path, methods=("zero_shot",))
    write_rows(tmp_path / "train.jsonl", label_rows(0, 40))
    write_rows(tmp_path / "test.jsonl", label_rows(70, 6))
    with pytest.raises(TrainingError, match="test_sha256: got"):
        run(config, tmp_path, methods=("zero_shot",))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"settings": {"red": {"rnak": 1}}}, r"settings of red: .*did you mean 'rank'"),
        ({"settings": {"loreft": {}}}, r"settings: got 'loreft', expected some of red"),
        ({"settings": {"few_shot": {"shots": -1}}}, r"few_shot: shots: got -1, expected a whole"),
        ({"settings": {"few_shot": {"shots": [2.5, 2]}}}, r"few_shot: shots: got 2.5, expected"),
        ({"settings": {"zero_shot": {"shots": 2}}}, r"of zero_shot: .*shots: unknown setting"),
        ({"settings": {"red": {"shots": 2}}}, r"settings of red: .*shots: unknown setting"),
        ({"settings": {"red": {"layers": [9]}}}, r"settings of red: layers: got 9"),
    ],
)
def test_settings_are_checked_before_anything_runs(
    tmp_path: Path, fields: dict, problem: str
) -> None:
    methods = ("red", "zero_shot", "few_shot")
    with pytest.raises(TrainingError, match=problem):
        run(make_config(tmp_path, **LABELS), tmp_path, methods=methods, **fields)
    assert not (tmp_path / "compared").exists()


def test_a_fixed_number_of_shots_is_shown_as_a_searched_one_is(tmp_path: Path) -> None:
    config = make_config(tmp_path, **LABELS)
    asked = [
        run(config, tmp_path / name, methods=("few_shot",), settings={"few_shot": {"shots": shots}})
        for name, shots in (("fixed", 2), ("listed", [2]))
    ]
    fixed, listed = (found.finals["few_shot"][0] for found in asked)
    assert fixed["serving"] == listed["serving"]
    assert fixed["serving"]["scope"] == "longer prompt"
    assert fixed["answers"] == listed["answers"]


def test_texts_are_compared_where_there_are_no_labels(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=2, positions="prompt", labels=None)
    methods = ("zero_shot", "loreft", "peft_prefix_tuning", "full_finetuning")
    found = run(config, tmp_path, methods=methods)
    assert found.metric.name == "exact_match"
    for name in methods:
        (record,) = found.finals[name]
        assert record["status"] == "done", record
        assert len(record["answers"]["texts"]) == 6
    assert "head only" not in [row.label for row in table_rows(found)]
    with pytest.raises(TrainingError, match=r"none has a place .*: a head writes no text"):
        run(config, tmp_path, methods=("head_only",))


def test_a_text_is_right_if_it_is_any_of_its_rows_references(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=1, labels=None)
    test = tmp_path / "references.jsonl"
    rows = [
        {"instruction": "Say 1", "completion": "yes", "references": ["yes", "x"]},
        {"instruction": "Say 2", "completion": "no"},
    ]
    test.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    task = load_task(config.choosing(test=test), loaded=byte_model())
    split = load_test(task)
    assert split.references == [("yes", "x"), ("no",)]
    answers = Answers(texts=("x", "x"))
    assert arena_for(task).value(answers, split) == 0.5


def test_free_answers_are_compared_by_their_loss_if_that_is_asked_for(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=2, labels=None)
    found = run(config, tmp_path, methods=("zero_shot", "loreft"), metric="loss")
    base, edited = (found.finals[name][0] for name in ("zero_shot", "loreft"))
    assert 0 < edited["test"]["loss"] < base["test"]["loss"]
    assert len(edited["answers"]["losses"]) == 6
    with pytest.raises(TrainingError, match="metric: got 'loss', expected none"):
        run(make_config(tmp_path, **LABELS), tmp_path / "b", metric="loss")


def test_a_method_is_asked_with_its_own_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(*arguments: object) -> Answers:
        asked.append(str(arguments[-1]))
        return answer_by_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(causal, "answer_by_model", answer)
    config = make_config(tmp_path, labels=("y", "n"), epochs=1, positions="l1")
    run(config, tmp_path, methods=("series_adapter", "loreft"), search=2)
    assert asked == ["prompt", "prompt", "l1", "l1", "prompt", "l1"]


def test_a_step_budget_holds_for_every_method(tmp_path: Path) -> None:
    config = make_config(tmp_path, **LABELS)
    found = run(config, tmp_path, methods=("red", "peft_lora"), steps=7)
    assert [records[0]["num_steps"] for records in found.finals.values()] == [7, 7]


def test_a_claimed_job_is_nobody_elses(tmp_path: Path) -> None:
    store, other = Store(tmp_path, {"a": 1}), Store(tmp_path, {"a": 1})
    job = Job.of("search", "loreft", {"rank": 4, "learning_rate": 1e-3}, 0)
    with store.claim(job) as mine:
        assert mine
        with other.claim(job) as theirs:
            assert not theirs
        store.write(job, {"status": "done"})
    with other.claim(job) as late:
        assert not late, "it is done"
    assert other.read(job) == {
        "phase": "search",
        "method": "loreft",
        "setting": {"learning_rate": 1e-3, "rank": 4},
        "seed": 0,
        "status": "done",
    }
    assert CONTENDERS["loreft"].label == "LoReFT"

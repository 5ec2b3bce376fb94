"""The page of results: made of committed documents alone, and saying no more than they do."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.page import PAGE, read_documents, read_minute, render, setting_text
from benchmarks.quality.plan import GROUPS, NOT_RUN
from benchmarks.quality.rows import prepare
from benchmarks.quality.run import PROVENANCE
from benchmarks.quality.summary import summarise
from benchmarks.quality.tasks import TASKS, QualityTask, template
from benchmarks.quality.verdicts import verdict
from trainer.compare.config import CompareConfig
from trainer.compare.store import Job, Store

COLOURS = QualityTask(
    "colours",
    "labels",
    "hues",
    {
        "loreft": {
            "methods": ["zero_shot", "loreft"],
            "seeds": [0, 1],
            "settings": {
                "loreft": {
                    "rank": 1,
                    "learning_rate": [1e-3, 1e-2],
                    "head": {"pooling": "mean"},
                }
            },
        },
        "lora": {"methods": ["lora"], "seeds": [0], "settings": {"lora": {"rank": 8}}},
        "direft": {"methods": ["direft"], "seeds": [0]},
    },
    {"template": template("{content}\n", "Hue:"), "labels": (" red", " blue")},
    {"0": "red", "1": "blue"},
)
TEXTS = [("blood", 0), ("sky", 1), ("sea", 1), ("rose", 0)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "hues"
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        rows = [
            {"id": f"{split}-{n}", "text": f"{text} {split}", "label": label, "domain": split}
            for n, (text, label) in enumerate(TEXTS)
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder.parent


def test_the_page_is_what_the_committed_results_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(read_documents(), read_minute())


def test_the_readme_has_figures_of_the_committed_results() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    for document in read_documents():
        found = verdict(document)
        if document["group"] == "labels":
            assert found is not None
            figures = [found.untrained, found.reft, found.lora]
            cells = [f"{100 * each['quality']['value']:.1f}" for each in figures if each]
            assert f"| {' | '.join((found.name, *cells))} |" in readme
            assert found.reft["parameters"] == 11_530
            assert (len(found.reft["seeds"]), len(found.lora["seeds"])) == (3, 1)


def test_every_task_is_planned_and_compares_with_settings_that_exist() -> None:
    for task in TASKS.values():
        assert task.name in NOT_RUN
        assert task.group in GROUPS
        for section in task.parts.values():
            CompareConfig(**section)


def test_rows_are_in_the_task_s_words(data: Path, tmp_path: Path) -> None:
    folder = prepare(COLOURS, data, tmp_path / "out")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    assert rows[1] == {"id": "test-1", "text": "sky test", "label": "blue"}
    assert json.loads((folder / "labels.json").read_text()) == ["red", "blue"]


def test_a_task_may_want_some_rows_alone(data: Path, tmp_path: Path) -> None:
    some = QualityTask("some", "domains", "hues", {}, where={"domain": "train"})
    folder = prepare(some, data, tmp_path / "out")
    assert len((folder / "train.jsonl").read_text().splitlines()) == len(TEXTS)
    assert (folder / "test.jsonl").read_text() == ""


def test_a_summary_counts_right_answers_and_says_what_is_missing(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _write_results(out / "colours")
    document = summarise(COLOURS, data, out)
    found = {result["method"]: result for result in document["results"]}
    assert document["test_rows"] == document["of_test_rows"] == 4
    assert found["zero_shot"]["quality"]["value"] == 0.5
    assert found["loreft"]["quality"]["value"] == 0.875  # four and three of four
    assert found["loreft"]["seeds"] == [0, 1]
    assert found["loreft"]["difference"]["value"] == pytest.approx(0.125)  # LoRA has three
    given = {"rank": 1, "positions": "l1", "layers": "all", "head.pooling": "mean"}
    assert found["loreft"]["setting"] == given | {"learning_rate": 1e-2}
    assert found["loreft"]["training_cpu_seconds"] == [10.0, 25.0, 40.0]  # the search's too
    assert found["lora"]["difference"] is None
    assert document["not_run"] == [{"part": "direft", "method": "direft"}]
    tried = [
        (each["setting"]["learning_rate"], each["error"]) for each in found["loreft"]["searched"]
    ]
    assert tried == [(1e-3, None), (1e-2, None), (9.0, "diverged")]


def test_parts_of_other_rows_or_settings_are_not_summed_up(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "colours"
    _write_results(folder)
    task = folder / "lora" / "task.json"
    facts = json.loads(task.read_text())
    task.write_text(json.dumps(facts | {"train_sha256": "other"}))
    with pytest.raises(AssertionError, match="parts of other rows"):
        summarise(COLOURS, data, tmp_path / "out")
    task.write_text(json.dumps(facts))
    store = Store(folder / "loreft", json.loads((folder / "loreft" / "task.json").read_text()))
    store.write(Job.of("final", "loreft", {"learning_rate": 1e-3}, 2), _record([" red"] * 4, 1.0))
    with pytest.raises(AssertionError, match="two settings"):
        summarise(COLOURS, data, tmp_path / "out")


def test_written_answers_are_scored_in_several_ways(tmp_path: Path) -> None:
    """By all references of a row, and queries by what they find in the data's database."""
    folder = tmp_path / "data" / "towns"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "towns.sqlite")) as database:
        database.execute("create table town (name text)")
        database.execute("insert into town values ('Ulm')")
        database.commit()
    for split in ("train", "valid", "test"):
        rows: list[dict[str, Any]] = [
            {"id": "0", "instruction": f"Which? {split}", "completion": "select 1"},
            {
                "id": "1",
                "instruction": f"{split}!",
                "completion": _QUERY,
                "references": ["select 3", _QUERY],
            },
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    asked = {name: name for name in ("instruction", "completion", "references")}
    parts = {"loreft": {"methods": ["loreft"], "seeds": [0]}}
    also = ("execution_accuracy",)
    task = QualityTask("towns", "text", "towns", parts, columns=asked, also=also)
    store = Store(tmp_path / "out" / "towns" / "loreft", _FACTS | {"settings": {}})
    store.agree("test.json", {"test_sha256": "0"})
    (store.folder / PROVENANCE).write_text(json.dumps([_PROVENANCE]))
    answers = {"choices": [], "texts": ["select 2", f"{_QUERY} order by name"], "losses": []}
    record = _record([" red"] * 4, 0.0) | {"test": {"exact_match": 0.5}, "answers": answers}
    store.write(Job.of("final", "loreft", {}, 0), record)
    (result,) = summarise(task, tmp_path / "data", tmp_path / "out")["results"]
    assert result["quality"]["value"] == 0  # neither is the reference, letter for letter
    assert result["also"]["execution_accuracy"]["value"] == 0.5


def test_the_page_shows_a_document(data: Path, tmp_path: Path) -> None:
    _write_results(tmp_path / "out" / "colours")
    document = summarise(COLOURS, data, tmp_path / "out")
    document["task"] = "trec"
    page = render([document])
    assert "| LoReFT | r 1, l1, layers all, head.pooling mean, lr 0.01 | 12 | 87.5 ± " in page
    assert "- trec: direft (direft)" in page
    assert "Prompt: `…⏎Hue:`" in page


@pytest.mark.parametrize(
    ("low", "high", "lower", "outcome"),
    [
        (0.01, 0.05, False, "ahead"),
        (-0.01, 0.05, False, "level"),
        (-0.05, -0.01, False, "behind"),
        (0.01, 0.05, True, "behind"),
        (-0.05, -0.01, True, "ahead"),
    ],
)
def test_only_a_whole_interval_makes_a_difference(
    low: float, high: float, lower: bool, outcome: str
) -> None:
    difference = {"value": (low + high) / 2, "low": low, "high": high}
    reft = {"method": "loreft", "difference": difference, "parameters": 10}
    lora = {"method": "lora", "difference": None, "parameters": 400}
    document = {"task": "x", "results": [reft, lora], "lower_is_better": lower}
    found = verdict(document)
    assert found is not None
    assert found.outcome == outcome


def test_settings_are_shown_in_few_words() -> None:
    setting = {"rank": 4, "layers": "all", "learning_rate": 2e-3, "positions": "f3"}
    assert setting_text(setting) == "r 4, f3, layers all, lr 0.002"


def _write_results(folder: Path) -> None:
    """Two runs of LoReFT with their search, one of LoRA, none of DiReFT."""
    labelling = {"labels": [" red", " blue"], "positions": "l1", "layers": "all"}
    facts = _FACTS | {"metric": "likelihood_accuracy", "config": labelling}
    all_right = [" red", " blue", " blue", " red"]
    one_wrong = [" red", " blue", " blue", " blue"]
    for part, section in COLOURS.parts.items():
        store = Store(folder / part, facts | {"settings": section.get("settings", {})})
        store.agree("test.json", {"test_sha256": "0"})
        (folder / part / PROVENANCE).write_text(json.dumps([_PROVENANCE]))
        if part == "loreft":
            store.write(Job.of("final", "zero_shot", {}, 0), _record([" red"] * 4, 0.0))
            for rate in (1e-3, 1e-2):
                job = Job.of("search", "loreft", {"learning_rate": rate}, 0)
                store.write(job, {"status": "done", "valid": {"likelihood_accuracy": rate}} | _COST)
            failed = {"status": "failed", "error": "diverged"}
            store.write(Job.of("search", "loreft", {"learning_rate": 9.0}, 0), failed)
            for seed, choices in enumerate((all_right, one_wrong)):
                job = Job.of("final", "loreft", {"learning_rate": 1e-2}, seed)
                store.write(job, _record(choices, 10.0))
        if part == "lora":
            store.write(Job.of("final", "lora", {"learning_rate": 1e-3}, 0), _record(one_wrong, 30))


_QUERY = "select name from town"
_FACTS: dict[str, Any] = {
    "model": "tiny",
    "metric": "exact_match",
    "train_rows": 4,
    "train_sha256": "1",
    "valid_rows": 4,
    "valid_sha256": "2",
    "test_rows": None,
    "config": {"labels": None, "positions": "l1", "layers": "all"},
}
_COST = {"training_cpu_seconds": 40.0}
_PROVENANCE = {
    "command": "x",
    "commit": "c",
    "date": "2026-01-01T00:00:00",
    "cpu": "y",
    "threads": 1,
    "torch": "2",
    "transformers": "5",
}


def _record(choices: list[str], seconds: float) -> dict[str, Any]:
    right = [" red", " blue", " blue", " red"]
    share = sum(a == b for a, b in zip(choices, right, strict=True)) / 4
    return {
        "status": "done",
        "test": {"likelihood_accuracy": share},
        "answers": {"choices": choices, "texts": [], "losses": []},
        "num_trainable": 12,
        "training_cpu_seconds": seconds,
        "file_bytes": 100,
        "serving": {"scope": "prompt", "extra_percent": 0.1},
    }

"""Files, folders and hubs to the splits of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from reft_core.errors import TrainingError
from tests.trainer.factories import label_rows, write_rows
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.data.splits import Splits, load_splits

TEXTS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(20)]


def splits(data: object, **settings: Any) -> Splits:
    return load_splits(TrainConfig.model_validate({"data": str(data), **settings}))


def all_rows(found: Splits) -> list[Example]:
    return [example for part in found.datasets.values() for example in part.examples]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", 'text,label\n"a, b",x\n"two\nlines",y\nNA,x\n1,y\n'),
        ("rows.tsv", 'text\tlabel\na, b\tx\n"two\nlines"\ty\nNA\tx\n1\ty\n'),
        ("rows.json", json.dumps([{"text": t, "label": y} for t, y in
                                  [("a, b", "x"), ("two\nlines", "y"), ("NA", "x"), ("1", "y")]])),
    ],
)  # fmt: skip
def test_text_stays_text_in_every_format(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    rows = sorted(all_rows(splits(tmp_path / name)), key=lambda row: row.where)
    assert {row.texts[0] for row in rows} == {"a, b", "two\nlines", "NA", "1"}
    assert {row.label for row in rows} == {"x", "y"}


def test_parquet_brings_its_label_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": [f"t{n}" for n in range(8)], "label": [n % 2 for n in range(8)]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    found = splits(tmp_path / "rows.parquet")
    assert found.labels == ("no", "yes")
    assert {row.label for row in all_rows(found)} == {"no", "yes"}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "text,label\nx\n", r"a\.csv:2: not as many cells"),
        ("a.csv", "text,label\nx,y,z\n", r"a\.csv:2: not as many cells"),
        ("a.csv", 'text,label\n"x,y\n', "not valid CSV"),
        ("a.csv", "text,label\n,y\n", r"a\.csv:2: has no 'text'"),
        ("a.parquet", "PAR1", "not valid Parquet"),
        ("a.json", "{}", "not a list of rows"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainingError, match=problem):
        splits(tmp_path / name)


def test_a_folder_has_splits_and_the_names_of_labels(tmp_path: Path) -> None:
    for first, name in enumerate(("train", "validation", "test")):
        rows = [{"text": f"{name} {n}", "label": n % 2} for n in range(first, first + 4)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "labels.json").write_text('["off", "on"]')
    found = splits(tmp_path)
    assert list(found.datasets) == ["train", "valid", "test"]
    assert found.labels == ("off", "on")
    assert [row.completion for row in found.train.examples] == [" off", " on", " off", " on"]


@pytest.mark.parametrize("name", ["nowhere.csv", "no where", "a/b/c"])
def test_data_that_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=f"data: got '{name}', expected a file, a folder"):
        splits(name)


def test_a_folder_without_training_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"a split 'train' \(a file train\.jsonl or the like\)"):
        splits(tmp_path)


def test_a_hub_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])}
        )
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {"sentence": [f"{split} {n}" for n in range(4)], "label": labels}, features
                )
                for split, labels in (
                    ("train", [0, 1, 0, 1]),
                    ("validation", [1, 0, 1, 0]),
                    ("test", [-1, -1, -1, -1]),
                )
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = splits("org/glue:sst2")
    assert asked == [("org/glue", "sst2")]
    assert list(found.datasets) == ["train", "valid"], "labels of test are kept back"
    assert found.labels == ("n", "p")
    assert found.train.examples[1].label == "p"
    assert found.train.examples[1].where == "org/glue:sst2/train[1]"
    assert "column 'sentence' is read as 'text'" in found.remarks


def test_what_a_hub_says_no_to_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object) -> None:
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TrainingError, match=r"data: got 'glue'.*\(no network\)$"):
        splits("glue")


def test_columns_of_any_name_are_read_when_told(tmp_path: Path) -> None:
    rows = [{"Question": f"q{n}", "Kind": "ab"[n % 2], "agent": "x"} for n in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(TrainingError, match=r"rows\.jsonl:1: unknown column 'Question'"):
        splits(path)
    found = splits(path, columns={"text": "Question", "label": "Kind"})
    assert {row.label for row in all_rows(found)} == {"a", "b"}
    assert "column 'agent' is left out" in found.remarks


@pytest.mark.parametrize("ignored", ["all", ("agent",)])
def test_columns_are_left_out_only_when_told(tmp_path: Path, ignored: object) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "agent": "x"} for row in TEXTS])
    with pytest.raises(TrainingError, match=r"ignore_columns=\[agent\] leaves it out"):
        splits(path)
    assert len(all_rows(splits(path, ignore_columns=ignored))) == 20


def test_others_names_are_read_where_all_else_is_left_out(tmp_path: Path) -> None:
    rows = [{"sentence": f"s{n}", "intent": "ab"[n % 2], "agent": "x"} for n in range(8)]
    found = splits(write_rows(tmp_path / "rows.jsonl", rows), ignore_columns="all")
    assert {row.label for row in all_rows(found)} == {"a", "b"}
    whole = [{**row, "prompt": "y", "category": "z"} for row in TEXTS]
    found = splits(write_rows(tmp_path / "whole.jsonl", whole), ignore_columns="all")
    assert {row.kind for row in all_rows(found)} == {"label"}


def test_columns_for_evaluation_are_kept(tmp_path: Path) -> None:
    row = {"id": "7", "instruction": "2+2", "completion": "It is 4.", "answer": "4"}
    path = write_rows(tmp_path / "rows.jsonl", [row, {**row, "instruction": "x", "id": "8"}] * 2)
    found = all_rows(splits(path))
    assert {row.kept["id"] for row in found} == {"7", "8"}
    assert {row.kept["answer"] for row in found} == {"4"}


def test_pairs_are_one_message_of_two_texts(tmp_path: Path) -> None:
    rows = [{"text": f"a{n}", "text_pair": f"b{n}", "label": "xy"[n % 2]} for n in range(8)]
    row = splits(write_rows(tmp_path / "rows.jsonl", rows)).train.examples[0]
    assert len(row.texts) == 2
    assert row.question == f"{row.texts[0]}\nSecond text: {row.texts[1]}"


def test_scores_stay_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"a{n}", "text_pair": "b", "label": n / 4} for n in range(8)]
    found = all_rows(splits(write_rows(tmp_path / "rows.jsonl", rows)))
    assert sorted(row.label for row in found) == [n / 4 for n in range(8)]


def test_validation_rows_are_taken_from_training_and_it_is_said(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", label_rows(0, 100))
    found = splits(path)
    train, valid = found.datasets["train"].examples, found.datasets["valid"].examples
    assert (len(train), len(valid)) == (90, 10)
    assert not {row.turns for row in train} & {row.turns for row in valid}
    assert any("10 of 100 training rows are kept apart" in remark for remark in found.remarks)
    again = splits(path)
    assert again.datasets["valid"].examples == valid
    assert splits(path, seed=1).datasets["valid"].examples != valid


def test_rows_that_are_the_same_to_people_stay_together(tmp_path: Path) -> None:
    rows = [
        {"text": text, "label": "ab"[n % 2]}
        for n in range(30)
        for text in (f"Text {n}", f"text  {n}", f"ＴＥＸＴ {n}")
    ]
    found = splits(write_rows(tmp_path / "rows.jsonl", rows))
    keys = [{row.prompt_key for row in part.examples} for part in found.datasets.values()]
    assert not keys[0] & keys[1]
    assert len(all_rows(found)) == 90


def test_the_last_row_of_a_label_stays_in_training(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": f"only {n}"} for n in range(10)]
    rows += [{"text": f"u{n}", "label": "often"} for n in range(10)]
    found = splits(write_rows(tmp_path / "rows.jsonl", rows))
    assert {row.label for row in found.datasets["valid"].examples} == {"often"}


def test_too_few_rows_to_take_some_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="1 rows are too few"):
        splits(write_rows(tmp_path / "rows.jsonl", label_rows(0, 1)))


def test_leaks_are_dropped_when_told(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", label_rows(0, 10))
    write_rows(tmp_path / "valid.jsonl", label_rows(8, 4))
    with pytest.raises(TrainingError, match="leaks=drop"):
        splits(tmp_path)
    found = splits(tmp_path, leaks="drop")
    assert [len(part.examples) for part in found.datasets.values()] == [8, 4]
    assert any("2 rows that are in valid too are dropped" in r for r in found.remarks)


def test_a_test_row_in_training_is_a_leak_in_any_case_and_spacing(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [*TEXTS, {"text": "Is  THIS one", "label": "a"}])
    write_rows(tmp_path / "test.jsonl", [{"text": "is this one", "label": "b"}])
    with pytest.raises(
        TrainingError, match=r"test\.jsonl:1: the same prompt is at .*train\.jsonl:21"
    ):
        splits(tmp_path)
    found = splits(tmp_path, leaks="drop", valid_share=0.2)
    assert "train: 1 rows that are in test too are dropped" in found.remarks
    assert "THIS" not in {word for row in found.train.examples for word in row.question.split()}


def test_labels_that_training_lacks_are_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TEXTS)
    found = splits(path, labels=("a", "b", "c"))
    assert "no training row has the label c" in found.remarks
    write_rows(tmp_path / "valid.jsonl", [{"text": "new", "label": "d"}])
    with pytest.raises(TrainingError, match=r"valid\.jsonl:1: label 'd' is none of"):
        splits(path, valid=tmp_path / "valid.jsonl", labels=("a", "b"))

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from reft_core.errors import InvalidRequest, TrainingError
from tests.trainer.factories import write_rows
from trainer.evaluation.rows import merge_references, read_rows, sample, with_labels
from trainer.evaluation.tasks import chosen_metrics, task_of


def rows_of(tmp_path: Path, *rows: dict[str, object], **options: object):
    return read_rows(write_rows(tmp_path / "test.jsonl", list(rows)), **options)  # type: ignore[arg-type]


def test_labels_are_those_beside_the_file_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(["no", "yes"]))
    write_rows(tmp_path / "test.jsonl", [{"id": "t7", "text": "a", "text_pair": "b", "label": 1}])
    found = read_rows(tmp_path)
    (row,) = found.rows
    assert found.labels == ("no", "yes")
    assert (row.id, row.answer, row.references, row.candidates) == (
        "t7",
        "yes",
        ("yes",),
        found.labels,
    )
    assert row.texts == ("a", "b")
    assert "a" in row.question
    assert "b" in row.question


def test_labels_are_found_in_the_rows_and_numbers_keep_their_order(tmp_path: Path) -> None:
    found = rows_of(tmp_path, *({"text": "x", "label": n} for n in (10, 2, 0)))
    assert found.labels == ("0", "2", "10")
    assert task_of(found.rows).kind == "labels"


def test_an_unknown_label_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"test.jsonl:2: .*'c'"):
        rows_of(
            tmp_path, {"text": "x", "label": "a"}, {"text": "x", "label": "c"}, labels=("a", "b")
        )


def test_rows_of_text_alone_are_read_and_not_asked(tmp_path: Path) -> None:
    found = rows_of(tmp_path, {"id": "7", "text": "Once."}, {"text": "Twice.", "page": 3})
    assert [(row.id, row.turns, row.references) for row in found.rows] == [
        ("7", (), ("Once.",)),
        ("2", (), ("Twice.",)),
    ]
    assert task_of(found.rows).metrics == ("loss", "perplexity")
    with pytest.raises(InvalidRequest, match=r"metrics: got 'bleu'.*no question.*test.jsonl:1"):
        chosen_metrics(["bleu"], found.rows)
    with pytest.raises(TrainingError, match=r"test.jsonl:2: has no 'label'"):
        rows_of(tmp_path, {"text": "x", "label": "a"}, {"text": "y"})
    with pytest.raises(TrainingError, match=r"test.jsonl:1: text: got ' ', expected text"):
        rows_of(tmp_path, {"text": " "})


def test_a_text_with_a_column_as_others_call_it_is_not_alone(tmp_path: Path) -> None:
    found = rows_of(tmp_path, {"text": "x", "intent": "a"})
    assert (found.labels, found.rows[0].answer) == (("a",), "a")
    with pytest.raises(TrainingError, match=r"test.jsonl:1: has no 'label'"):
        rows_of(tmp_path, {"text": "x", "hypothesis": "y"})


def test_labels_beside_a_file_are_those_of_others_column_too(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(["no", "yes"]))
    found = rows_of(tmp_path, {"text": "x", "intent": 1})
    assert (found.labels, found.rows[0].answer) == (("no", "yes"), "yes")


def test_a_split_of_a_folder_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "dev.jsonl", [{"text": "x", "label": "a"}])
    (tmp_path / "labels.json").write_text(json.dumps(["a", "b"]))
    found = read_rows(tmp_path, split="valid")
    assert (found.path.name, found.labels) == ("dev.jsonl", ("a", "b"))
    with pytest.raises(TrainingError, match=r"a split 'test' \(a file test.jsonl.*it has valid"):
        read_rows(tmp_path)


def test_a_hubs_data_set_is_read_as_training_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    parts = {"train": [0, 1], "validation": [1, 0], "test": [-1, -1]}
    there = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"sentence": [f"{split} {n}" for n in labels], "label": labels}, features
            )
            for split, labels in parts.items()
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: there)
    found = read_rows("org/glue:sst2", split="valid")
    assert (str(found.path), found.labels) == ("org/glue:sst2/validation", ("n", "p"))
    assert [(row.question, row.answer) for row in found.rows] == [
        ("validation 1", "p"),
        ("validation 0", "n"),
    ]
    with pytest.raises(TrainingError, match="a split 'test'; it has train, valid"):
        read_rows("org/glue:sst2")  # whose labels are kept back


def test_scores_have_no_labels(tmp_path: Path) -> None:
    found = rows_of(tmp_path, {"text": "x", "label": 2.5}, {"text": "y", "label": 3.0})
    assert found.labels == ()
    assert found.rows[0].is_number
    assert task_of(found.rows).metrics == ("pearson", "spearman")


def test_a_choice_takes_the_place_of_the_answer_in_the_completion(tmp_path: Path) -> None:
    (row,) = rows_of(
        tmp_path,
        {
            "instruction": "true or false?",
            "completion": "the correct answer is true",
            "answer": "true",
            "choices": ["true", "false"],
        },
    ).rows
    assert row.candidates == ("the correct answer is true", "the correct answer is false")
    assert task_of([row]).extractor == "after_trigger"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"completion": "The answer is B.", "answer": "B", "choices": ["A", "B"]}, "letters"),
        ({"completion": "1 + 1 = 2\n#### 2", "answer": "2"}, "numbers"),
        ({"completion": "SELECT x FROM y ;"}, "sql"),
        ({"completion": "so be it"}, "text"),
        ({"completion": "a", "references": ["a", "b"]}, "text"),
    ],
)
def test_a_task_follows_from_the_columns(tmp_path: Path, row: dict[str, object], kind: str) -> None:
    found = rows_of(tmp_path, {"instruction": "q"} | row)
    task = task_of(found.rows)
    assert task.kind == kind
    assert ("bleu" in task.metrics) == ("references" in row)


def test_a_limit_draws_rows_and_keeps_their_order(tmp_path: Path) -> None:
    found = rows_of(tmp_path, *({"instruction": f"q{n}", "completion": "a"} for n in range(50)))
    drawn = sample(found, 10, seed=1)
    places = [int(row.id) for row in drawn.rows]
    assert len(set(places)) == 10
    assert places == sorted(places)
    assert places != list(range(1, 11))
    assert drawn.num_in_file == 50
    assert sample(found, 10, seed=1) == drawn
    assert sample(found, 10, seed=2) != drawn
    assert sample(found, 50, seed=1) is found


def test_rows_that_ask_the_same_share_their_references(tmp_path: Path) -> None:
    said = [("q", "a"), ("p", "b"), ("q", "c"), ("q", "a")]
    found = merge_references(
        rows_of(tmp_path, *({"instruction": q, "completion": a} for q, a in said))
    )
    assert [row.references for row in found.rows] == [("a", "c"), ("b",)]


def test_completions_among_an_adapters_labels_are_choices_as_it_writes_them(
    tmp_path: Path,
) -> None:
    found = rows_of(tmp_path, {"instruction": "q", "completion": "yes"})
    (row,) = with_labels(found, (" no", " yes")).rows
    assert (row.answer, row.choices) == ("yes", ("no", "yes"))
    assert (row.candidates, row.references) == ((" no", " yes"), (" yes",))
    assert with_labels(found, ("no", "perhaps")) == found


def test_metrics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"instruction": "q", "completion": "a"}).rows
    with pytest.raises(InvalidRequest, match=r"'blue'.*bleu"):
        chosen_metrics(["blue"], rows)
    with pytest.raises(InvalidRequest, match=r"likelihood_accuracy.*test.jsonl:1"):
        chosen_metrics(["likelihood_accuracy"], rows)
    with pytest.raises(InvalidRequest, match=r"'accuracy'.*test.jsonl:1"):
        chosen_metrics(["accuracy"], rows)

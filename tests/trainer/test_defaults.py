"""What is chosen where a config says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reft_core.errors import TrainingError
from tests.trainer.factories import byte_model, byte_tokenizer, label_rows, write_rows
from trainer import preparing
from trainer.config import TrainConfig
from trainer.data.splits import load_splits
from trainer.defaults import Chooser, choose_from_data, choose_from_model, choose_steps
from trainer.train import train

TEXTS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(200)]


def chosen(folder: Path, rows: list[Any], **settings: Any) -> Chooser:
    path = write_rows(folder / "rows.jsonl", rows)
    config = TrainConfig.model_validate({"data": str(path), **settings})
    return choose_from_data(config, load_splits(config))


def test_labelled_texts_get_a_prompt_that_ends_in_the_trigger(tmp_path: Path) -> None:
    config = chosen(tmp_path, TEXTS).config
    assert config.name == "rows"
    assert config.template is not None
    assert config.template.user + config.template.generation == "Text: {content}\nLabel:"
    assert config.labels == (" a", " b")
    assert (config.positions, config.rank, config.learning_rate) == ("l1", 1, 8e-3)
    assert config.batch_size == 16


def test_many_labels_and_long_answers_get_more_rank(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": f"label {n % 20}"} for n in range(200)]
    assert chosen(tmp_path, rows).config.rank == 4
    rows = [{"instruction": f"t{n}", "completion": f"a long answer {n}"} for n in range(40)]
    config = chosen(tmp_path, rows).config
    assert (config.rank, config.labels, config.template) == (4, None, None)
    assert config.batch_size == 4


def test_answers_that_recur_are_labels(tmp_path: Path) -> None:
    chooser = chosen(tmp_path, label_rows(0, 40))
    assert chooser.config.labels == ("n", "y")
    assert any("these 2" in choice.reason for choice in chooser.choices)


def test_what_is_given_is_not_chosen(tmp_path: Path) -> None:
    given = {"rank": 2, "positions": "f1+l1", "labels": ["b", "a"], "batch_size": 3, "name": "x"}
    chooser = chosen(tmp_path, TEXTS, **given)
    config = chooser.config
    assert (config.rank, config.positions, config.batch_size) == (2, "f1+l1", 3)
    assert config.labels == (" b", " a"), "in the given order, as the model answers them"
    assert {choice.setting for choice in chooser.choices} == {"template", "learning_rate"}


def test_a_label_that_is_only_evaluated_is_named(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "train.jsonl", [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(8)]
    )
    write_rows(tmp_path / "test.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}])
    config = TrainConfig(data=str(tmp_path))
    message = r"test\.jsonl:2: label 'c' has no training row; the labels are a, b"
    with pytest.raises(TrainingError, match=message):
        choose_from_data(config, load_splits(config))


def test_scores_and_a_single_label_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="a causal model gives no scores"):
        chosen(tmp_path, [{"text": f"t{n}", "label": n / 8} for n in range(20)])
    with pytest.raises(TrainingError, match="every row has the label ' a'"):
        chosen(tmp_path, [{"text": f"t{n}", "label": "a"} for n in range(20)])


@pytest.mark.parametrize(("num_layers", "layers"), [(30, "every:3"), (4, "all")])
def test_layers_depend_on_the_base(tmp_path: Path, num_layers: int, layers: str) -> None:
    chooser = chosen(tmp_path, TEXTS)
    choose_from_model(chooser, num_layers, byte_tokenizer())
    assert chooser.config.layers == layers


def test_a_base_without_a_chat_template_gets_a_plain_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    chooser = chosen(tmp_path, label_rows(0, 40))
    choose_from_model(chooser, 4, tokenizer)
    assert chooser.config.template is not None
    assert chooser.config.template.user == "{content}\n"


@pytest.mark.parametrize(
    ("num_rows", "seconds_a_step", "steps"),
    [
        (10_000, 0.01, 150),
        (10_000, 0.6, 100),  # a minute at this speed
        (10_000, 60.0, 100),  # no fewer, or it would learn nothing
        (32, 0.01, 24),  # twelve times through two batches
    ],
)
def test_steps_fit_the_rows_and_the_time(num_rows: int, seconds_a_step: float, steps: int) -> None:
    chooser = Chooser(TrainConfig(data="x", batch_size=16))
    choose_steps(chooser, num_rows, lambda n: n * seconds_a_step)
    assert chooser.config.steps == steps
    assert chooser.config.sized


def test_epochs_that_are_given_stay(tmp_path: Path) -> None:
    chooser = Chooser(TrainConfig(data="x", epochs=2))
    choose_steps(chooser, 100, lambda n: 1e9)
    assert chooser.config.steps is None
    assert not chooser.choices


def test_data_alone_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "seconds_for", lambda *_: 0.0)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "mood.jsonl", TEXTS[:60])
    result = train(TrainConfig(data="mood.jsonl"), loaded=byte_model())
    assert result.config.output == Path("runs/mood/mood.safetensors")
    spec = result.adapter.spec
    assert spec.name == "mood"
    assert spec.template is not None
    assert spec.template.generation == "Label:"
    assert spec.task.labels == (" a", " b")
    report = (tmp_path / "runs/mood/report.html").read_text()
    assert "rows have a text and a label" in report
    assert "training rows are kept apart" in report

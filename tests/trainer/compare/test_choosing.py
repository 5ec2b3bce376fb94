"""The quick choice among labels against the slow one, and the two ways to ask a base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reft_core.classification import label_tokens
from reft_core.positions import PositionRule
from tests.trainer.compare.factories import moved_model, tiny_task
from trainer.collate import Collator
from trainer.compare.answering import (
    answer_by_engine,
    answer_by_model,
    by_transformers,
    serving_base,
)
from trainer.compare.baseline import BaselineModel
from trainer.compare.choosing import choose_labels
from trainer.data import TokenisedExample
from trainer.evaluation.scoring import METRICS
from trainer.evaluation.splits import generate, likeliest_labels

COLLATOR = Collator(PositionRule.parse("l1"))
LABELS = ("ye", "ya", "no", "na", "mi", "qu", "zo")


def test_the_bound_never_changes_what_is_chosen(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    model = moved_model(task)
    rows = task.train.rows
    answers = dict(zip(LABELS, label_tokens(task.loaded.tokenizer, LABELS), strict=True))
    wanted = likeliest_labels(
        model, task.loaded.tokenizer, rows, LABELS, COLLATOR, batch_size=8, edited=True
    )
    assert len(set(wanted)) > 1
    assert choose_labels(model, rows, answers, COLLATOR, batch_size=8) == wanted


def test_of_equally_likely_labels_the_first_is_chosen(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    same = {"one": (5, 0), "two": (5, 0)}
    model = BaselineModel(task.loaded.model, task.loaded.model)
    rows = task.train.rows[:3]
    assert choose_labels(model, rows, same, COLLATOR, batch_size=2) == ["one"] * 3


def test_few_labels_are_scored_whole_when_the_model_is_sure() -> None:
    asked: list[int] = []

    class Sure:
        device = torch.device("cpu")

        def __call__(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
            asked.append(len(batch["labels"]))
            cells = int((batch["labels"] != -100).sum())
            return {"logits": torch.zeros(cells, 50).index_fill_(1, torch.tensor([7]), 20.0)}

    answers = {str(token): (token, token) for token in range(20)}
    rows = [TokenisedExample((1, 2, 3), (4,))] * 6
    chosen = choose_labels(Sure(), rows, answers, COLLATOR, batch_size=6)  # type: ignore[arg-type]
    assert chosen == ["7"] * 6
    assert asked == [6, 6], "one forward of the prompts, one of the label that can win"


@pytest.mark.parametrize("metric", ["likelihood_accuracy", "loss"])
def test_engine_and_transformers_agree_on_the_base(tmp_path: Path, metric: str) -> None:
    task = tiny_task(tmp_path)
    model = BaselineModel(task.loaded.model, task.loaded.model)
    attention = task.loaded.model.config._attn_implementation
    served = answer_by_engine(task, task.train, METRICS[metric])
    assert task.loaded.model.config._attn_implementation == attention
    direct = answer_by_model(task, task.train, METRICS[metric], model, task.config.rule)
    assert served.choices == direct.choices
    losses = torch.tensor([loss for loss, _ in direct.losses])
    torch.testing.assert_close(torch.tensor([x for x, _ in served.losses]), losses)
    assert [n for _, n in served.losses] == [n for _, n in direct.losses]


def test_engine_and_transformers_write_the_same(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    prompts = [row.prompt for row in task.train.rows[:6]]
    with serving_base(task.loaded, [], 64) as engine:
        served = generate(engine, prompts, None, 8)
    assert by_transformers(task.loaded, prompts, 8) == served

from __future__ import annotations

import pytest

from reft_core.positions import PositionRule
from trainer.collate import IGNORED, Collator
from trainer.data import TokenisedExample

ROWS = [TokenisedExample((11, 12, 13), (21, 22)), TokenisedExample((14,), (23, 24, 25))]


def test_prompts_end_and_completions_begin_in_one_column() -> None:
    batch = Collator(PositionRule.parse("l1"), pad_id=9)(ROWS)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 9], [9, 9, 14, 23, 24]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[21, 22, IGNORED], [23, 24, 25]]
    assert batch["edit_columns"].tolist() == [[[2]], [[2]]]


@pytest.mark.parametrize(
    ("text", "tied", "expected"),
    [
        ("l2", True, [[[1, 2]], [[2]]]),
        ("f1+l1", False, [[[0], [2]], [[], []]]),
        ("f1+l1", True, [[[0, 2]], [[]]]),
        ("prompt", True, [[[0, 1, 2]], [[2]]]),
        ("f1", True, [[[0]], [[2]]]),
        ("2", True, [[[2]], [[]]]),
        ("-2", True, [[[1]], [[]]]),
        ("40", True, [[[]], [[]]]),
    ],
)
def test_edited_columns_follow_the_rule_on_each_unpadded_prompt(
    text: str, tied: bool, expected: list[list[list[int]]]
) -> None:
    batch = Collator(PositionRule.parse(text, tied=tied))(ROWS)
    columns, valid = batch["edit_columns"], batch["edit_valid"]
    found = [
        [columns[row, unit][valid[row, unit]].tolist() for unit in range(columns.shape[1])]
        for row in range(len(ROWS))
    ]
    assert found == expected

"""Rows to one padded batch, aligned where prompts end and completions begin.

Prompts are padded on the left, completions on the right. All completions then start in the
same column, so the columns that carry loss are the last ones, and a suffix rule edits
nearly the same columns in every row.

Dimension letters: B rows, P longest prompt, C longest completion, T = P + C − 1 columns
(the last completion token is predicted, never read), U units, K most positions of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from reft_core.positions import PositionRule
from trainer.data import TokenisedExample

IGNORED = -100
"""Label of a cell that carries no loss; torch's own convention."""


class Batch(TypedDict):
    """The arguments of :meth:`trainer.reft_model.ReftModel.forward`."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64: 1 on tokens, 0 on padding."""
    position_ids: Tensor
    """(B, T) int64, counted from 0 on each row's first token; 0 on padding."""
    labels: Tensor
    """(B, C) int64: what the last C columns predict, :data:`IGNORED` on padding."""
    edit_columns: Tensor
    """(B, U, K) int64: columns each unit edits; 0 where invalid."""
    edit_valid: Tensor
    """(B, U, K) bool: whether the cell of ``edit_columns`` is meant."""


class Collator:
    """Makes batches for one position rule."""

    def __init__(self, rule: PositionRule, pad_id: int = 0) -> None:
        self.rule = rule
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[TokenisedExample]) -> Batch:
        """One batch of ``rows``, in order, on the CPU."""
        num_prompt = max(len(row.prompt) for row in rows)  # P
        num_answer = max(len(row.completion) for row in rows)  # C
        shape = (len(rows), num_prompt + num_answer - 1)
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full((len(rows), num_answer), IGNORED)
        columns: list[list[list[int]]] = []
        for index, row in enumerate(rows):
            tokens = (*row.prompt, *row.completion[:-1])
            start = num_prompt - len(row.prompt)
            cells = slice(start, start + len(tokens))
            input_ids[index, cells] = torch.tensor(tokens)
            attention_mask[index, cells] = 1
            position_ids[index, cells] = torch.arange(len(tokens))
            labels[index, : len(row.completion)] = torch.tensor(row.completion)
            units = self.rule.resolve(len(row.prompt))
            columns.append([[start + position for position in unit] for unit in units])
        edit_columns, edit_valid = _pad_columns(columns)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            edit_columns=edit_columns,
            edit_valid=edit_valid,
        )


def _pad_columns(columns: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """``edit_columns`` and ``edit_valid`` of columns by row and unit."""
    num_units = len(columns[0])
    longest = max(len(unit) for units in columns for unit in units)
    edit_columns = torch.zeros(len(columns), num_units, longest, dtype=torch.int64)
    edit_valid = torch.zeros(len(columns), num_units, longest, dtype=torch.bool)
    for row, units in enumerate(columns):
        for unit, cells in enumerate(units):
            edit_columns[row, unit, : len(cells)] = torch.tensor(cells, dtype=torch.int64)
            edit_valid[row, unit, : len(cells)] = True
    return edit_columns, edit_valid

"""Batches padded on the right, as encoders read them: their tokens and their edited cells.

Dimension letters: B rows, T tokens of the longest, M edited cells of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reft_core.errors import TrainingError
from reft_core.positions import PositionRule
from trainer.interventions import Cells


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """``rows`` as one int64 tensor (B, T), filled up with ``value`` on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def edited_cells(rule: PositionRule, lengths: Sequence[int]) -> list[Cells | None]:
    """What each unit of ``rule`` edits in texts of these lengths: rows and columns (M,).

    None stands for all cells. A rule that edits every token may edit padding too: no token
    attends to it, and no head reads it.
    """
    if rule.every and rule.anchor == "prompt_end":
        return [None]
    resolved = [rule.resolve(length) for length in lengths]
    cells: list[Cells | None] = []
    for unit in range(rule.num_units):
        pairs = [(row, column) for row, units in enumerate(resolved) for column in units[unit]]
        rows, columns = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        cells.append((rows, columns))
    return cells


def check_edited(where: str, rule: PositionRule, length: int) -> None:
    """Raise :class:`TrainingError` for a prompt of ``length`` tokens that ``rule`` leaves alone."""
    if not any(rule.resolve(length)):
        raise TrainingError(
            f"{where}: positions '{rule}' edit nothing in its prompt of {length} tokens"
        )

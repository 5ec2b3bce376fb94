"""The cells of a batch that differ, one after the other: no padding, and nothing twice.

What a model computes at a token follows from the tokens up to it and from which of them are
edited. Rows that begin alike (a template, a system message, one prompt before each of several
answers) therefore share those cells, and their gradients add up as they should.

Dimension letters: B rows, N cells, W most cells of a row, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PackedRow:
    """One row as far as it is not padding."""

    beginning: Tokens
    """Tokens whose keys and values are known; they are no cells."""
    tokens: Tokens
    """Those that follow it."""
    edits: tuple[tuple[int, ...], ...]
    """Units that edit each of ``tokens``."""
    predicts_from: int = 0
    """Place among ``tokens`` of the prompt's last one."""

    def behind(self, num_virtual: int) -> PackedRow:
        """The row with so many virtual tokens first, as cells with negative token ids."""
        tokens = (*range(-num_virtual, 0), *self.tokens)
        edits = (*(((),) * num_virtual), *self.edits)
        return PackedRow(self.beginning, tokens, edits, self.predicts_from + num_virtual)


def unpad(
    input_ids: Tensor,
    attention_mask: Tensor,
    units: Sequence[Mapping[int, tuple[int, ...]]],
    *,
    last_prompt: int,
    whole: bool,
) -> list[PackedRow]:
    """The rows of a batch (B, T), whose prompts all end in column ``last_prompt``.

    ``units`` are those that edit a column, by column. A row's beginning ends before its first
    edited column, or before ``last_prompt``, where predictions begin; with ``whole`` it is empty.
    """
    rows = []
    for ids, mask, edits in zip(input_ids.tolist(), attention_mask.tolist(), units, strict=True):
        start = mask.index(1)
        end = start + sum(mask)
        split = start if whole else min([*edits, last_prompt])
        row_edits = tuple(edits.get(column, ()) for column in range(split, end))
        beginning, tokens = tuple(ids[start:split]), tuple(ids[split:end])
        rows.append(PackedRow(beginning, tokens, row_edits, last_prompt - split))
    return rows


@dataclass(frozen=True)
class Packing:
    """Where each cell comes from, and where each row finds its own."""

    rows: tuple[PackedRow, ...]
    tokens: Tensor
    """(N,) int64."""
    positions: Tensor
    """(N,) int64, counted from 0 on each row's first token, its beginning's included."""
    cells: Tensor
    """(B, W) int64: the cell of each of a row's tokens; 0 behind its last."""
    owners: Tensor
    """(N,) int64: a place of each cell in the flattened ``cells``."""
    edited: tuple[Tensor, ...]
    """(M,) int64 for each unit: the cells it edits, ascending."""

    @classmethod
    def of(
        cls, rows: Sequence[PackedRow], num_units: int, device: torch.device | str = "cpu"
    ) -> Packing:
        """The packing of ``rows``, whose cells are numbered as they first occur."""
        width = max(len(row.tokens) for row in rows)
        numbers: dict[tuple[Tokens | int, int, tuple[int, ...]], int] = {}
        tokens: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        cells = [[0] * width for _ in rows]
        edited: list[list[int]] = [[] for _ in range(num_units)]
        for index, row in enumerate(rows):
            before: Tokens | int = row.beginning
            for place, (token, units) in enumerate(zip(row.tokens, row.edits, strict=True)):
                # What stands before, and so on back to the row's first token, is in the key.
                key = (before, token, units)
                number = numbers.setdefault(key, len(numbers))
                if number == len(tokens):
                    tokens.append(token)
                    positions.append(len(row.beginning) + place)
                    owners.append(index * width + place)
                    for unit in units:
                        edited[unit].append(number)
                cells[index][place] = number
                before = number
        return cls(
            rows=tuple(rows),
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            cells=torch.tensor(cells, device=device),
            owners=torch.tensor(owners, device=device),
            edited=tuple(torch.tensor(t, dtype=torch.int64, device=device) for t in edited),
        )

    def predicting(self, count: int) -> Tensor:
        """(B, count) int64: the cells from each row's ``predicts_from`` on; any behind its last."""
        device = self.cells.device
        first = torch.tensor([row.predicts_from for row in self.rows], device=device)
        places = first[:, None] + torch.arange(count, device=device)
        return self.cells.gather(1, places.clamp(max=self.cells.shape[1] - 1))

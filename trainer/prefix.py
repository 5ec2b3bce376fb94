"""Keys and values of unedited prompt beginnings, computed once and kept.

What precedes the first edited position is the frozen base's alone, so it is the same in
every epoch. With a suffix rule that is nearly the whole prompt, and most of a step's work.

Dimension letters: B rows, N cells, S longest beginning, n tokens of one beginning, L layers,
H key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.below import StateStore, begins_at
from trainer.budget import Budget
from trainer.packing import PackedRow, Packing, Tokens
from trainer.row_attention import RowAttention, attending_by_row


class PrefixStore:
    """Keys and values by the tokens they come from, up to ``max_bytes`` of them.

    They are kept in the base's dtype. Beginnings that no longer fit are computed again each
    time. Nothing is evicted: epochs visit every row equally often, so a newer row is worth no
    more than an older one.
    """

    def __init__(self, base: PreTrainedModel, max_bytes: int) -> None:
        self.budget = Budget(max_bytes)
        self._base = base
        self._kept: dict[Tokens, Tensor] = {}
        self._states: dict[int, StateStore | None] = {}

    def states(self, first: int) -> StateStore | None:
        """What layer ``first`` is given of the tokens behind the beginnings, out of the same
        budget; None where nothing is below it or the base cannot begin there."""
        if first not in self._states:
            usable = first > 0 and begins_at(self._base, first)
            self._states[first] = StateStore(self._base, first, self.budget) if usable else None
        return self._states[first]

    def read(self, beginnings: Sequence[Tokens]) -> Tensor:
        """Keys and values (L, 2, B, H, S, D) of these beginnings, zeros behind their last.

        At least one must not be empty. The store keeps its own copy.
        """
        found = {tokens: self._kept[tokens] for tokens in beginnings if tokens in self._kept}
        new = [tokens for tokens in dict.fromkeys(beginnings) if tokens and tokens not in found]
        if new:
            for tokens, states in zip(new, self._compute(new), strict=True):
                found[tokens] = states
                self._keep(tokens, states)
        num_layers, _, num_heads, _, size = next(iter(found.values())).shape
        width = max(map(len, beginnings))
        shape = (num_layers, 2, len(beginnings), num_heads, width, size)
        batch = next(iter(found.values())).new_zeros(shape)
        for row, tokens in enumerate(beginnings):
            if tokens:
                batch[:, :, row, :, : len(tokens)] = found[tokens]
        return batch

    def _keep(self, tokens: Tokens, states: Tensor) -> None:
        if self.budget.take(states.nbytes):
            self._kept[tokens] = states

    @torch.no_grad()
    def _compute(self, beginnings: Sequence[Tokens]) -> list[Tensor]:
        """Keys and values (L, 2, H, n, D) of each, without a graph, edits or logits."""
        rows = [PackedRow((), tokens, ((),) * len(tokens)) for tokens in beginnings]
        packing = Packing.of(rows, 0, self._base.device)
        attention = RowAttention(packing, seen=[])
        with attending_by_row(self._base):
            self._base.base_model(**attention.inputs())
        assert attention.seen is not None
        all_cells = torch.stack([torch.stack(pair) for pair in attention.seen])  # (L, 2, H, N, D)
        return [
            all_cells[:, :, :, cells[: len(tokens)]]
            for tokens, cells in zip(beginnings, packing.cells, strict=True)
        ]

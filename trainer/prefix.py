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

from trainer.packing import PackedRow, Packing, Tokens
from trainer.row_attention import RowAttention, attending_by_row


class PrefixStore:
    """Keys and values by the tokens they come from, up to ``max_bytes`` of them.

    They are kept in the base's dtype. Beginnings that no longer fit are computed again each
    time. Nothing is evicted: epochs visit every row equally often, so a newer row is worth no
    more than an older one.
    """

    def __init__(self, base: PreTrainedModel, max_bytes: int) -> None:
        self.num_bytes = 0
        self._base = base
        self._max_bytes = max_bytes
        self._kept: dict[Tokens, Tensor] = {}

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
        if self.num_bytes + states.nbytes <= self._max_bytes:
            self._kept[tokens] = states
            self.num_bytes += states.nbytes

    @torch.no_grad()
    def _compute(self, beginnings: Sequence[Tokens]) -> list[Tensor]:
        """Keys and values (L, 2, H, n, D) of each, without a graph, edits or logits."""
        rows = [PackedRow((), tokens, ((),) * len(tokens)) for tokens in beginnings]
        packing = Packing.of(rows, 0, self._base.device)
        attention = RowAttention(packing, seen=[])
        with attending_by_row(self._base):
            self._base.base_model(
                input_ids=packing.tokens[None],
                position_ids=packing.positions[None],
                use_cache=False,
                reft_batch=attention,
            )
        assert attention.seen is not None
        all_cells = torch.stack([torch.stack(pair) for pair in attention.seen])  # (L, 2, H, N, D)
        return [
            all_cells[:, :, :, cells[: len(tokens)]]
            for tokens, cells in zip(beginnings, packing.cells, strict=True)
        ]

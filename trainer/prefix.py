"""Keys and values of unedited prompt beginnings, computed once and kept.

What precedes the first edited position is the frozen base's alone, so it is the same in
every epoch. With a suffix rule that is nearly the whole prompt, and most of a step's work.

Dimension letters: B rows, S columns, n tokens of one row's beginning, L layers, H
key-value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from reft_core.loading import cache_argument

Tokens = tuple[int, ...]


class PrefixStore:
    """Keys and values by the tokens they come from, up to ``max_bytes`` of them.

    Beginnings that no longer fit are computed again each time. Nothing is evicted: epochs
    visit every row equally often, so a newer row is worth no more than an older one.
    """

    def __init__(self, base: PreTrainedModel, max_bytes: int) -> None:
        self.num_bytes = 0
        self._base = base
        self._max_bytes = max_bytes
        self._kept: dict[Tokens, Tensor] = {}

    def cache(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> DynamicCache:
        """A new cache of the beginnings in these (B, S) tensors, padded on the left.

        The caller may extend it; the store keeps its own copy.
        """
        rows = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        states = {tokens: self._kept[tokens] for tokens in rows if tokens in self._kept}
        # One row of each beginning that is new; an empty one has nothing to compute.
        new = {tokens: row for row, tokens in enumerate(rows) if tokens and tokens not in states}
        if new:
            width = max(map(len, new))
            chosen = torch.tensor(list(new.values()), device=input_ids.device)
            computed = self._compute(
                *(t[chosen, -width:] for t in (input_ids, attention_mask, position_ids))
            )
            for tokens, state in zip(new, computed, strict=True):
                states[tokens] = state[:, :, -len(tokens) :].clone()
                self._keep(tokens, states[tokens])
        return _assemble(rows, states, input_ids.shape[1])

    def _keep(self, tokens: Tokens, state: Tensor) -> None:
        if self.num_bytes + state.nbytes <= self._max_bytes:
            self._kept[tokens] = state
            self.num_bytes += state.nbytes

    @torch.no_grad()
    def _compute(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Keys and values (B, 2L, H, S, D), without a graph, edits or logits."""
        cache = DynamicCache()
        self._base.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **cache_argument(self._base.base_model, cache),
        )
        return torch.stack([t for layer in cache.layers for t in (layer.keys, layer.values)], dim=1)


def _assemble(rows: list[Tokens], states: dict[Tokens, Tensor], width: int) -> DynamicCache:
    """A cache of ``width`` columns from each row's states (2L, H, n, D); zeros on padding."""
    some = next(iter(states.values()))
    num_states, num_heads, _, size = some.shape
    batch = some.new_zeros(num_states, len(rows), num_heads, width, size)  # (2L, B, H, S, D)
    for row, tokens in enumerate(rows):
        if tokens:
            batch[:, row, :, -len(tokens) :] = states[tokens]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(batch[::2], batch[1::2], strict=True)):
        cache.update(keys, values, layer)
    return cache

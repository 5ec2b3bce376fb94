"""Attention of packed rows, each over what is known before it and over its own cells.

Plugs into any transformers model as the engine's does (:mod:`reft_core.engine.attention`), but
keeps a graph and stores nothing.

Dimension letters: L layers, B rows, N cells, W most cells of a row, S longest known beginning,
K = S + W keys, H query heads, KH key-value heads, G = H / KH, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from reft_core.agreement import TOLERANCE, disagreement
from reft_core.engine.attention import ATTENTION_NAME, NewTokens
from reft_core.errors import UnsupportedModel
from trainer.packing import PackedRow, Packing

_MAX_SCORES = 1 << 22
"""Scores of one layer that are kept for the gradient; more of them are computed again there."""

_CHECK_LENGTHS = (4, 6, 6)
"""Tokens of the rows that a base is tried with; most come after another row."""


@dataclass
class RowAttention:
    """A :class:`reft_core.engine.attention.ForwardBatch` over the rows of ``packing``."""

    packing: Packing
    before: Tensor | None = None
    """(L, 2, B, KH, S, D): keys and values of what stands before the cells, padded on the right."""
    num_before: Tensor | None = None
    """(B,) int64: how many of the S are the row's own. None: all of them."""
    seen: list[tuple[Tensor, Tensor]] | None = None
    """If a list, receives each layer's new keys and values (KH, N, D)."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, new: NewTokens) -> Tensor:
        """The attention's output (1, N, H, D) of q (1, H, N, D), k and v (1, KH, N, D)."""
        if self.seen is not None:
            self.seen.append((new.key[0], new.value[0]))
        query, key, value = (self._by_row(t[0]) for t in (new.query, new.key, new.value))
        if self.before is not None:
            known_keys, known_values = self.before[new.layer]
            key = torch.cat([known_keys, key], dim=2)  # (B, KH, K, D)
            value = torch.cat([known_values, value], dim=2)
        mask = self._mask(new.window, query.shape[2], key.shape[2])
        out = _attention(query, key, value, mask, new.scale, new.softcap)  # (B, H, W, D)
        num_heads, size = out.shape[1], out.shape[3]
        by_cell = out.transpose(1, 2).reshape(-1, num_heads, size)  # (B·W, H, D)
        return by_cell.index_select(0, self.packing.owners).unsqueeze(0)

    def inputs(self) -> dict[str, Any]:
        """What a forward over the cells is given, while :func:`attending_by_row` is open."""
        return {
            "input_ids": self.packing.tokens[None],
            "position_ids": self.packing.positions[None],
            "use_cache": False,
            "reft_batch": self,
        }

    def of_rows(self, places: Sequence[int], packing: Packing) -> RowAttention:
        """The same before the cells of ``packing``, which has the rows in ``places`` alone."""
        if self.before is None:
            return RowAttention(packing)
        chosen = torch.tensor(places, device=self.before.device)
        num_before = None if self.num_before is None else self.num_before[chosen]
        return RowAttention(packing, self.before[:, :, chosen], num_before)

    def _by_row(self, states: Tensor) -> Tensor:
        """States (heads, N, D) of the cells as (B, heads, W, D)."""
        rows, width = self.packing.cells.shape
        chosen = states.transpose(0, 1).index_select(0, self.packing.cells.flatten())
        return chosen.view(rows, width, *chosen.shape[1:]).transpose(1, 2)

    def _mask(self, window: int | None, width: int, num_keys: int) -> Tensor:
        """Which keys each query sees: bool (B or 1, W, K).

        A cell behind a row's last one sees the row as well; nobody reads what it computes.
        """
        if window not in self._masks:
            device = self.packing.cells.device
            num_before = num_keys - width
            own = torch.arange(width, device=device)
            before = torch.arange(num_before, device=device)
            known = torch.full((1,), num_before) if self.num_before is None else self.num_before
            known = known.to(device)[:, None, None]  # (B or 1, 1, 1)
            q_pos = known + own[:, None]
            k_pos = torch.cat([before.expand(len(known), 1, -1), known + own], dim=2)
            visible = k_pos <= q_pos  # (B or 1, W, K)
            visible[:, :, :num_before] &= before < known
            if window is not None:
                visible &= k_pos > q_pos - window
            self._masks[window] = visible
        return self._masks[window]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention of q (B, H, W, D) over k and v (B, KH, K, D) where ``mask`` is true.

    In float32 whatever the model's dtype. torch's own kernel for CPUs has a slow backward in
    bfloat16 (on SmolLM2-135M a third of a step), so it serves only where the scores of all
    layers would take too much memory. Heads that share keys are rows of one product.
    """
    rows, num_heads, width, size = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    if softcap is None and rows * num_heads * width * num_keys > _MAX_SCORES:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask.unsqueeze(1), scale=scale, enable_gqa=True
        )
    grouped = query.float().reshape(rows, num_kv_heads, -1, size)  # (B, KH, G·W, D)
    scores = (grouped * scale) @ key.float().mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, num_kv_heads, -1, width, num_keys)  # (B, KH, G, W, K)
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
    out = weights.view(rows, num_kv_heads, -1, num_keys) @ value.float()  # (B, KH, G·W, D)
    return out.view(rows, num_heads, width, size).to(query.dtype)


@contextmanager
def attending_by_row(base: PreTrainedModel) -> Iterator[None]:
    """While open, ``base`` attends by the :class:`RowAttention` it is given as ``reft_batch``."""
    before = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@torch.no_grad()
def check_packs(base: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModel` if packed rows are not what ``base`` computes of each alone.

    A model may mix tokens otherwise than by attention, or attend in ways that are not
    reproduced here. The engine refuses such models too; better to know before training.
    """
    generator = torch.Generator().manual_seed(0)
    num_words = base.get_input_embeddings().num_embeddings
    texts = [
        tuple(torch.randint(num_words, (length,), generator=generator).tolist())
        for length in _CHECK_LENGTHS
    ]
    packing = Packing.of([PackedRow((), text, ((),) * len(text)) for text in texts], 0, base.device)
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")  # each model's own definition
    try:
        alone = torch.cat(
            [
                base(input_ids=torch.tensor([text], device=base.device), use_cache=False).logits[0]
                for text in texts
            ]
        )
    finally:
        base.set_attn_implementation(before)
    with attending_by_row(base):
        packed = base(**RowAttention(packing).inputs()).logits[0]
    found = torch.cat(
        [packed[cells[: len(text)]] for text, cells in zip(texts, packing.cells, strict=True)]
    )
    error, tolerance = disagreement(found, alone, base.dtype), TOLERANCE[base.dtype]
    if error > tolerance:  # what is not finite is no matter of packing: training will say so
        raise UnsupportedModel(
            f"model: {type(base).__name__} computes other logits for a batch without padding than "
            f"for each of its rows (by {error:.2g} of the largest, expected at most {tolerance}); "
            "it cannot be trained or served here",
            field="model",
        )

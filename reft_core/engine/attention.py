"""Attention over slots, plugged into any transformers model by its AttentionInterface.

The model calls :func:`slot_attention` in every layer and hands it the batch that the runner
passed to ``model(..., reft_batch=batch)``. The batch stores the new keys and values in their
slots and attends over what the slots hold. No module-level state is involved.

Dimension letters: B sequences, N packed tokens, H query heads, KH key-value heads,
G = H / KH, D head size, L cached positions.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from reft_core.engine import varlen
from reft_core.engine.kv import SlotKV
from reft_core.errors import UnsupportedModel

ATTENTION_NAME = "reft_slots"

_UNSUPPORTED = ("s_aux", "position_bias", "alibi", "head_mask")
"""Keyword arguments by which models ask for attention this module does not compute."""


@dataclass(frozen=True)
class NewTokens:
    """What one layer attends with: queries (·, H, ·, D), keys and values (·, KH, ·, D)."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None = None
    """Positions that a query sees, itself included; None: all before it."""
    softcap: float | None = None
    """Bound of the scores, c·tanh(score / c)."""


class ForwardBatch(Protocol):
    """What one forward attends over."""

    def attend(self, new: NewTokens) -> Tensor:
        """Store keys and values, return the attention output (1 or B, T, H, D)."""


@dataclass(frozen=True)
class Segment:
    """Rows start..end-1 of a packed prefill: a slot's tokens from ``first_position`` on."""

    start: int
    end: int
    slot: int
    first_position: int
    num_shared: int = 0
    """Tokens, from the slot's first on, whose keys and values are those of the segment before.
    Attention may read them there, and once for both."""


@dataclass(frozen=True)
class Copied:
    """Tokens start..end-1 of a slot are those of another slot, ``source``."""

    source: int
    slot: int
    start: int
    end: int


@dataclass
class PrefillBatch:
    """A packed prefill: q (1, H, N, D), k and v (1, KH, N, D), one segment a sequence.

    Keys and values of the segments are stored first; then ``copied`` in its order.
    """

    kv: SlotKV
    segments: Sequence[Segment]
    copied: Sequence[Copied] = ()
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    _ragged: varlen.Ragged | None = None

    @cached_property
    def packed(self) -> tuple[array[int], array[int]]:
        """Segments, and copies, as compiled loops take them: their numbers one after the other,
        int64. The same in every layer."""
        return (
            array("q", chain.from_iterable(map(astuple, self.segments))),
            array("q", chain.from_iterable(map(astuple, self.copied))),
        )

    def attend(self, new: NewTokens) -> Tensor:
        """See :class:`ForwardBatch`."""
        if varlen.serves(new.query, new.key, new.window, new.softcap):
            return self._attend_at_once(new)
        self._store(new)
        _, num_heads, num_rows, head_size = new.query.shape
        out = new.query.new_empty(1, num_rows, num_heads, head_size)
        for segment in self.segments:
            rows = slice(segment.start, segment.end)
            known = segment.first_position + segment.end - segment.start
            if segment.first_position == 0:  # all keys are the segment's own
                keys, values = new.key[:, :, rows], new.value[:, :, rows]
            else:
                keys = self.kv.keys[new.layer][segment.slot, :, :known].unsqueeze(0)
                values = self.kv.values[new.layer][segment.slot, :, :known].unsqueeze(0)
            sees_all = segment.first_position == 0 and (new.window is None or known <= new.window)
            mask = None if sees_all and new.softcap is None else self._mask(segment, new.window)
            query = new.query[:, :, rows]
            attended = _attention(query, keys, values, mask, new.scale, new.softcap)  # (1, H, n, D)
            out[:, rows] = attended.transpose(1, 2)
        return out

    def _store(self, new: NewTokens) -> None:
        """Put keys and values where they belong: first the new ones, then copies."""
        for segment in self.segments:
            rows, first = slice(segment.start, segment.end), segment.first_position
            key, value = new.key[0, :, rows], new.value[0, :, rows]
            self.kv.append(new.layer, segment.slot, first, key, value)
        for copied in self.copied:
            self.kv.copy(new.layer, copied.source, copied.slot, copied.start, copied.end)

    def _attend_at_once(self, new: NewTokens) -> Tensor:
        """The same for all segments in one kernel, out of rows and gathered slots."""
        kernel = varlen.kernel()
        assert kernel is not None, "the kernel serves"
        if self._ragged is None:
            spans = [(s.slot, s.first_position, s.end - s.start) for s in self.segments]
            copies = [(c.source, c.slot, c.start, c.end) for c in self.copied]
            self._ragged = varlen.ragged(spans, copies, new.query.device)
        at = self._ragged
        # (N, heads, D)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (new.query, new.key, new.value))
        self.kv.append_rows(new.layer, at.rows, k, v)
        if at.copied_from is not None and at.copied_to is not None:
            copied = self.kv.read_rows(new.layer, at.copied_from)
            self.kv.append_rows(new.layer, at.copied_to, *copied)
        if at.keys is not None:
            k, v = self.kv.read_rows(new.layer, at.keys)  # (T, KH, D)
        return kernel(q, k, v, at, new.scale, new.window).unsqueeze(0)  # (1, N, H, D)

    def _mask(self, segment: Segment, window: int | None) -> Tensor:
        """Additive mask (n, L): causal, and within the sliding window if there is one."""
        num_rows = segment.end - segment.start
        name = (segment.first_position, num_rows, window)
        if name not in self._masks:
            device = self.kv.device
            q_pos = segment.first_position + torch.arange(num_rows, device=device).unsqueeze(1)
            k_pos = torch.arange(segment.first_position + num_rows, device=device)
            self._masks[name] = _additive(k_pos, q_pos, window, self.kv.all.dtype)
        return self._masks[name]


@dataclass
class DecodeBatch:
    """One new token for each of slots 0..B-1: q (B, H, 1, D), k and v (B, KH, 1, D)."""

    kv: SlotKV
    positions: Tensor
    """(B,) int64: where each slot's new token goes."""
    num_keys: int
    """Keys attended over: at least the longest context in the batch, the new token included."""
    store_at: Tensor | None = None
    """(B,) int64: where the new keys go, if not to ``positions``."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, new: NewTokens) -> Tensor:
        """See :class:`ForwardBatch`."""
        store_at = self.positions if self.store_at is None else self.store_at
        self.kv.append_each(new.layer, store_at, new.key[:, :, 0], new.value[:, :, 0])
        num_rows, num_kv_heads, _, head_size = new.key.shape
        # Heads that share keys become rows of one product: no key is repeated in memory.
        grouped = new.query.reshape(num_rows, num_kv_heads, -1, head_size)  # (B, KH, G, D)
        keys = self.kv.keys[new.layer][:num_rows, :, : self.num_keys]  # (B, KH, L, D)
        values = self.kv.values[new.layer][:num_rows, :, : self.num_keys]
        mask = self._mask(new.window)
        out = _attention(grouped, keys, values, mask, new.scale, new.softcap)
        return out.reshape(num_rows, 1, -1, head_size)  # (B, 1, H, D)

    def _mask(self, window: int | None) -> Tensor:
        """Additive mask (B, 1, 1, L)."""
        if window not in self._masks:
            k_pos = torch.arange(self.num_keys, device=self.positions.device)
            mask = _additive(k_pos, self.positions.unsqueeze(1), window, self.kv.all.dtype)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def _additive(k_pos: Tensor, q_pos: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query at ``q_pos`` (n, 1) may see a key at ``k_pos`` (L,), else -inf."""
    visible = k_pos <= q_pos
    if window is not None:
        visible &= k_pos > q_pos - window
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Scaled dot-product attention, causal if there is no mask; query heads may be a multiple of
    key heads."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, is_causal=mask is None, enable_gqa=True
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = (kv.repeat_interleave(repeats, dim=1) for kv in (key, value))
    assert mask is not None, "a soft cap comes with an explicit mask"
    scores = softcap * torch.tanh(query @ key.mT * (scale / softcap))
    weights = torch.softmax(scores.float() + mask, dim=-1).to(value.dtype)
    return weights @ value


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    reft_batch: ForwardBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls; see AttentionInterface. Masks come from the batch."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__}: attention with {name!r} is not supported"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    new = NewTokens(layer, query, key, value, scale, sliding_window, softcap)
    return reft_batch.attend(new), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)

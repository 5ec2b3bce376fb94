"""Attention of a whole packed prefill in one kernel: torch's ``varlen_attn``, on GPUs.

It takes what flash attention takes, so half precision and no soft cap. Whether it serves is
decided by :func:`serves` alone; everything else is left to the loop over segments.

Dimension letters: N packed rows, T keys of all segments together, S segments, H query heads,
KH key-value heads, D head size.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_LEAST_CAPABILITY = (8, 0)
"""Flash attention's kernels begin with Ampere."""
_TOLERANCE = 0.05
"""Largest difference from float32 arithmetic on numbers around one; bfloat16 has 8 bits."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ragged:
    """Where the rows of a packed prefill are stored, and where the keys they see stand."""

    num_queries: tuple[int, ...]
    """Rows of each segment."""
    num_keys: tuple[int, ...]
    """Keys each segment's last row sees: what its slot held before, and its own."""
    query_ends: Tensor
    """(S + 1,) int32: where each segment's rows begin, and where the last one's end."""
    key_ends: Tensor
    """(S + 1,) int32: the same for keys."""
    rows: Tensor
    """(2, N) int64: slot and position of each row."""
    keys: Tensor | None
    """(2, T) int64: slot and position of each key. None where the keys are the rows, in order."""
    copied_from: Tensor | None
    """(2, C) int64: slots and positions whose keys belong elsewhere too."""
    copied_to: Tensor | None
    """(2, C) int64: where."""


def ragged(
    segments: Sequence[tuple[int, int, int]],
    copies: Sequence[tuple[int, int, int, int]],
    device: torch.device | str,
) -> Ragged:
    """The indices of a prefill of segments: (slot, first position, number of rows) each.

    Their rows follow each other without gaps, from row 0 on. ``copies`` are made in their order
    once the rows are stored: (source, slot, start, end) each.
    """
    slots = torch.tensor([slot for slot, _, _ in segments])
    firsts = [first for _, first, _ in segments]
    queries = tuple(count for _, _, count in segments)
    keys = tuple(first + count for _, first, count in segments)
    ranges = [torch.arange(a, b) for a, b in zip(firsts, keys, strict=True)]
    parts = [
        torch.tensor([0, *itertools.accumulate(queries)]),
        torch.tensor([0, *itertools.accumulate(keys)]),
        slots.repeat_interleave(torch.tensor(queries)),
        torch.cat(ranges),
    ]
    if any(firsts):
        parts.append(slots.repeat_interleave(torch.tensor(keys)))
        parts.append(torch.cat([torch.arange(count) for count in keys]))
    if copies:
        parts += _resolved(copies)
    # One copy to the device: each would wait for the device by itself.
    moved = list(torch.cat(parts).to(device).split([len(part) for part in parts]))
    query_ends, key_ends = moved[0].to(torch.int32), moved[1].to(torch.int32)
    pairs = [torch.stack((a, b)) for a, b in zip(moved[2::2], moved[3::2], strict=True)]
    rows = pairs.pop(0)
    at_keys = pairs.pop(0) if any(firsts) else None
    copied_from, copied_to = pairs if copies else (None, None)
    return Ragged(queries, keys, query_ends, key_ends, rows, at_keys, copied_from, copied_to)


def _resolved(copies: Sequence[tuple[int, int, int, int]]) -> list[Tensor]:
    """Slots and positions to read, then to write, for all copies at once.

    A copy of a copy reads what that one read, so all reads may come before all writes.
    """
    num_slots = 1 + max(max(source, slot) for source, slot, _, _ in copies)
    length = max(end for _, _, _, end in copies)
    origin = torch.arange(num_slots).unsqueeze(1).repeat(1, length)
    written = torch.zeros(num_slots, length, dtype=torch.bool)
    for source, slot, start, end in copies:
        origin[slot, start:end] = origin[source, start:end]
        written[slot, start:end] = True
    slots, positions = written.nonzero(as_tuple=True)
    return [origin[slots, positions], positions, slots, positions]


@dataclass(frozen=True)
class Kernel:
    """torch's ``varlen_attn``, whose arguments differ from release to release."""

    function: Callable[..., Any]
    takes_gqa: bool
    """Whether query heads may be a multiple of key heads; since torch 2.12."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Kernel | None:
        """The kernel behind ``function``; None if it cannot be told to be causal."""
        names = inspect.signature(function).parameters
        if not {"scale", "window_size"} <= set(names):
            return None
        return cls(function, "enable_gqa" in names)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        at: Ragged,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Causal attention (N, H, D) of query (N, H, D) over key and value (T, KH, D).

        The last row of a segment stands at its last key, as flash attention has it.
        """
        options: dict[str, Any] = {}
        if self.takes_gqa:
            options["enable_gqa"] = True
        elif query.shape[1] != key.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            key, value = (kv.repeat_interleave(repeats, dim=1) for kv in (key, value))
        longest = max(at.num_keys)
        sees_all = window is None or window >= longest
        out: Tensor = self.function(
            query,
            key,
            value,
            at.query_ends,
            at.key_ends,
            max(at.num_queries),
            longest,
            scale=scale,
            window_size=(-1 if sees_all or window is None else window - 1, 0),
            **options,
        )
        return out


@cache
def kernel() -> Kernel | None:
    """The installed torch's kernel, or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return Kernel.of(varlen_attn)


def fits(dtype: torch.dtype, head_dim: int, softcap: float | None) -> bool:
    """Whether flash attention computes this at all."""
    aligned = head_dim % 8 == 0 and head_dim <= _MAX_HEAD_DIM
    return dtype in _DTYPES and aligned and softcap is None


def serves(query: Tensor, key: Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether the kernel is to be used for query (1, H, N, D) and key (1, KH, N, D)."""
    if not query.is_cuda or not fits(query.dtype, query.shape[3], softcap):
        return False
    heads = query.shape[1], key.shape[1], query.shape[3]
    return _agrees(query.device, query.dtype, heads, window is not None)


@cache
def _agrees(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], windowed: bool
) -> bool:
    """Whether the kernel runs on this device and computes what it should, tried once.

    ``heads`` are H, KH and D.
    """
    if torch.version.hip or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    found = kernel()
    if found is None:
        return False
    try:
        error = largest_error(found, device, dtype, heads, 3 if windowed else None)
    except Exception as reason:
        log.warning("prefill attends segment by segment: varlen_attn failed: %s", reason)
        return False
    if not error <= _TOLERANCE:
        log.warning("prefill attends segment by segment: varlen_attn is off by %.2g", error)
        return False
    return True


@torch.inference_mode()
def largest_error(
    tried: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    window: int | None,
) -> float:
    """How far a kernel is from float32 arithmetic on a small random problem.

    Two segments, the second one of which continues what its slot holds.
    """
    num_heads, num_kv_heads, head_dim = heads
    at = ragged([(0, 0, 7), (1, 6, 5)], (), device)
    generator = torch.Generator().manual_seed(0)

    def draw(num_rows: int, num_heads: int) -> Tensor:
        drawn = torch.randn(num_rows, num_heads, head_dim, generator=generator)
        return drawn.to(device, dtype)

    query = draw(sum(at.num_queries), num_heads)
    key, value = (draw(sum(at.num_keys), num_kv_heads) for _ in range(2))
    scale = head_dim**-0.5
    found = tried(query, key, value, at, scale, window)
    expected = plain(query, key, value, at, scale, window)
    return float((found.float() - expected).abs().max())


def plain(
    query: Tensor, key: Tensor, value: Tensor, at: Ragged, scale: float, window: int | None
) -> Tensor:
    """What a kernel computes, (N, H, D) in float32, one segment after the other."""
    outputs = []
    pairs = zip(
        query.float().split(at.num_queries),
        key.float().split(at.num_keys),
        value.float().split(at.num_keys),
        strict=True,
    )
    for q, k, v in pairs:
        repeats = q.shape[1] // k.shape[1]
        k, v = (kv.repeat_interleave(repeats, dim=1) for kv in (k, v))
        scores = torch.einsum("nhd,thd->hnt", q, k) * scale
        at_key = torch.arange(len(k), device=q.device)
        at_query = at_key[len(k) - len(q) :].unsqueeze(1)
        hidden = at_key > at_query
        if window is not None:
            hidden |= at_key <= at_query - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hnt,thd->nhd", weights, v))
    return torch.cat(outputs)

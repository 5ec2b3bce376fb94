"""What the fused forward consists of: its matrix products, and what it does between them.

Letters: N rows, B sequences, H query heads, KH key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reft_core.engine.attention import DecodeBatch, ForwardBatch, NewTokens, PrefillBatch
from reft_core.engine.linear import JoinedLinear, Linear, PackedLinear

if TYPE_CHECKING:
    from reft_core.engine.layer import Layer


@dataclass(frozen=True)
class HeadLayout:
    """How one layer's heads are laid out and attend: H queries, then KH keys, KH values."""

    layer: int
    num_queries: int
    num_keys: int
    scale: float
    window: int | None
    """Positions that a query sees, itself included; None: all before it."""


class LayerRun(Protocol):
    """Several layers by one call."""

    def __call__(
        self,
        first: int,
        last: int,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """h (N, d), contiguous, changed from what goes into layer ``first`` to what comes out of
        layer ``last - 1``; cos and sin (N, D). Of that layer only ``rows`` (R,), if given."""


class Operations:
    """The operations by torch, on any device. Also what faster ones are measured against."""

    angle_dtype: torch.dtype | None = None
    """Dtype of ``cos`` and ``sin``; None: the model's."""

    def linear(self, *maps: nn.Linear) -> Linear:
        """One product for several linear maps, the way that suits where their weights are."""
        on_cpu = maps[0].weight.device.type == "cpu"
        return PackedLinear(*maps) if on_cpu else JoinedLinear(*maps)

    def whole_layers(self, layers: Sequence[Layer]) -> LayerRun | None:
        """A way through layers without edits inside them; None: each does its operations."""
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) ∘ weight over the last dimension."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) ∘ up of (N, 2·width), gates first; (N, width)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rotate_(self, heads: Tensor, layout: HeadLayout, cos: Tensor, sin: Tensor) -> None:
        """Turn the queries and keys among ``heads`` (N, H + 2·KH, D) in place.

        cos and sin (N, D), both halves of D alike, as transformers' rotary embedding gives them.
        """
        turned = heads[:, : layout.num_queries + layout.num_keys]
        left, right = turned.chunk(2, dim=-1)
        swapped = torch.cat((-right, left), dim=-1)
        turned.copy_(turned * cos.unsqueeze(1) + swapped * sin.unsqueeze(1))

    def attend(
        self,
        heads: Tensor,
        layout: HeadLayout,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        shape: tuple[int, int],
    ) -> Tensor:
        """Attention (N, H·D) of N = B·T new tokens, ``shape`` being (B, T).

        Turns ``heads`` and stores their keys and values in the batch's slots.
        """
        if isinstance(batch, DecodeBatch):
            return self.attend_decode(heads, layout, cos, sin, batch)
        if isinstance(batch, PrefillBatch):
            return self.attend_prefill(heads, layout, cos, sin, batch)
        return self._attend_turned(heads, layout, cos, sin, batch, shape)

    def attend_decode(
        self,
        heads: Tensor,
        layout: HeadLayout,
        cos: Tensor,
        sin: Tensor,
        batch: DecodeBatch,
    ) -> Tensor:
        """:meth:`attend` for one new token of each of B sequences; (B, H·D)."""
        return self._attend_turned(heads, layout, cos, sin, batch, (len(heads), 1))

    def attend_prefill(
        self,
        heads: Tensor,
        layout: HeadLayout,
        cos: Tensor,
        sin: Tensor,
        batch: PrefillBatch,
    ) -> Tensor:
        """:meth:`attend` for the N packed tokens of a prefill; (N, H·D)."""
        return self._attend_turned(heads, layout, cos, sin, batch, (1, len(heads)))

    def _attend_turned(
        self,
        heads: Tensor,
        layout: HeadLayout,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        shape: tuple[int, int],
    ) -> Tensor:
        self.rotate_(heads, layout, cos, sin)
        sizes = (layout.num_queries, layout.num_keys, layout.num_keys)
        query, key, value = (
            part.unflatten(0, shape).transpose(1, 2) for part in heads.split(sizes, dim=1)
        )  # (B, heads, T, D)
        new = NewTokens(layout.layer, query, key, value, layout.scale, layout.window)
        attended = batch.attend(new)
        return attended.reshape(len(heads), -1)

"""Multi-head parallel adapter. He et al. 2022 (arXiv 2110.04366), table 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, activate
from reft_core.methods.base import SiteSizes
from reft_core.methods.bottleneck import Bottleneck


class MultiHeadParallelAdapter(Bottleneck):
    """A parallel adapter for each attention head, before the output projection.

    Head i adds act(x·W_down⁽ⁱ⁾ + b⁽ⁱ⁾)·W_up⁽ⁱ⁾ + b'⁽ⁱ⁾ of width D to its own output, x being the
    attention's input. ``rank`` is that of one head. Stored as one edit of rank H·r whose up
    is block-diagonal.

    Starts as the other parallel adapters. He et al.'s ``MHAdapter_Layer`` draws both matrices
    from N(0, 0.02²), which makes its untrained edit a random one.
    """

    method = "multi_head_parallel_adapter"
    equation = "per head: act(xW_down + b)W_up + b'"
    citation = "arXiv 2110.04366, table 1"
    source = "input"
    sites = ("heads",)

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "relu") -> None:
        assert sizes.head_dim > 0, "the size of a head must be known"
        num_heads = sizes.out_size // sizes.head_dim
        super().__init__(sizes, num_heads * rank, activation)
        self.rank = rank
        del self.up
        self.head_up = nn.Parameter(torch.zeros(num_heads, rank, sizes.head_dim))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        inner = activate(self.activation, F.linear(x, self.down, self.down_bias))  # (N, H·r)
        return inner @ self._block_diagonal() + self.up_bias  # (N, H·D)

    def _block_diagonal(self) -> Tensor:
        """All heads' up-projections as one (H·r, H·D) matrix."""
        return torch.block_diag(*self.head_up)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.down.mT.clone(),
            up=self._block_diagonal(),
            bias=self.down_bias.clone(),
            shift=self.up_bias.clone(),
            activation=self.activation,
            source="input",
        )

    @classmethod
    @override
    def stored_rank(cls, rank: int, sizes: SiteSizes) -> int:
        return rank * (sizes.out_size // sizes.head_dim)

"""Low-rank maps on a site's input or output: LoRA and the bottleneck adapters.

He et al. 2022 (arXiv 2110.04366) write them as one function, Δ = s·act(x·W_down + b)·W_up, that
differs in what x is and what it is added to. Biases of the up-projection become ``shift``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part, activate
from reft_core.methods.base import Intervention, SiteSizes


class LoRA(Intervention):
    """Δ(h, x) = s·(x·A ᵀ)·Bᵀ for a linear map h = x·W; A (r, d_in), B (d_out, r).

    s is fixed by the config: α/r, or α/√r in its rank-stabilised form (arXiv 2312.03732).
    A is drawn as in the reference code (Kaiming uniform with a = √5), B starts at zero.
    """

    method = "lora"
    equation = "s·(xAᵀ)Bᵀ"
    citation = "arXiv 2106.09685, §4.1"
    activations = ("identity",)
    sites = ("linear",)
    source = "input"
    phase = "all"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.down = nn.Parameter(torch.empty(rank, self.x_size))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(sizes.out_size, rank))
        self.scale = 1.0

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale  # (N, d_out)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.down.mT.clone(), up=self.up.mT.clone(), scale=self.scale, source="input"
        ).fold()

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up")


class _Bottleneck(Intervention):
    """s·act(x·W_down + b_down)·W_up + s·b_up; subclasses say what x is."""

    activations = ("relu", "gelu", "silu", "tanh", "sigmoid", "identity")
    sites: ClassVar[tuple[str, ...]] = ("mlp_output", "attn_output")
    phase = "all"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "relu") -> None:
        super().__init__(sizes, rank, activation)
        self.down = nn.Parameter(torch.empty(rank, self.x_size))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.down_bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(sizes.out_size, rank))
        self.up_bias = nn.Parameter(torch.zeros(sizes.out_size))
        self.scale = 1.0

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        inner = activate(self.activation, F.linear(x, self.down, self.down_bias))  # (N, r)
        return F.linear(inner, self.up, self.up_bias) * self.scale  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.down.mT.clone(),
            up=self.up.mT.clone() * self.scale,
            bias=self.down_bias.clone(),
            shift=self.up_bias * self.scale,
            activation=self.activation,
            source=self.source,
        )

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up", "bias", "shift")


class SeriesAdapter(_Bottleneck):
    """Δ(h) = act(h·W_down + b)·W_up + b', h a sublayer's output (Houlsby et al. 2019).

    W_up and both biases start at zero, so the untrained adapter changes nothing.
    """

    method = "series_adapter"
    equation = "act(hW_down + b)W_up + b'"
    citation = "arXiv 2110.04366, table 1; arXiv 1902.00751"


class ParallelAdapter(_Bottleneck):
    """Δ(x) = act(x·W_down + b)·W_up + b', x a sublayer's input, added to its output."""

    method = "parallel_adapter"
    equation = "act(xW_down + b)W_up + b'"
    citation = "arXiv 2110.04366, §4.2"
    source = "input"


class ScaledParallelAdapter(_Bottleneck):
    """Δ(x) = s·(act(x·W_down + b)·W_up + b') with s = 4, the paper's choice for FFNs."""

    method = "scaled_parallel_adapter"
    equation = "s·(act(xW_down + b)W_up + b'), s = 4"
    citation = "arXiv 2110.04366, §4.6"
    source = "input"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "relu") -> None:
        super().__init__(sizes, rank, activation)
        self.scale = 4.0


class MultiHeadParallelAdapter(_Bottleneck):
    """A parallel adapter for each attention head, before the output projection.

    Head i adds act(x·W_down⁽ⁱ⁾ + b⁽ⁱ⁾)·W_up⁽ⁱ⁾ + b'⁽ⁱ⁾ of width D to its own output, x being the
    attention's input. ``rank`` is that of one head. Stored as one edit of rank H·r whose up
    is block-diagonal.
    """

    method = "multi_head_parallel_adapter"
    equation = "per head: act(xW_down + b)W_up + b'"
    citation = "arXiv 2110.04366, §4.4"
    source = "input"
    sites = ("heads",)

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "relu") -> None:
        assert sizes.head_dim > 0, "the size of a head must be known"
        num_heads = sizes.out_size // sizes.head_dim
        super().__init__(sizes, num_heads * rank, activation)
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


class BitFit(Intervention):
    """Δ = b (d_out,): a trained bias on linear maps (Ben Zaken et al. 2022).

    BitFit trains the biases a model has; added to the frozen ones this is the same, and it
    serves models without biases as well. Starts at zero.
    """

    method = "bitfit"
    equation = "b"
    citation = "arXiv 2106.10199"
    activations = ("identity",)
    sites = ("linear",)
    phase = "all"
    has_rank = False

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.bias = nn.Parameter(torch.zeros(sizes.out_size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.bias.expand_as(h)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(shift=self.bias.clone())

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("shift",)

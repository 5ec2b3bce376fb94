"""Scaled parallel adapter. He et al. 2022 (arXiv 2110.04366), table 1."""

from __future__ import annotations

from reft_core.edits import Activation
from reft_core.methods.base import SiteSizes
from reft_core.methods.bottleneck import Bottleneck


class ScaledParallelAdapter(Bottleneck):
    """Δ(x) = s·(act(x·W_down + b)·W_up + b') with s = 4, the paper's choice for FFNs."""

    method = "scaled_parallel_adapter"
    equation = "s·(act(xW_down + b)W_up + b'), s = 4"
    citation = "arXiv 2110.04366, table 1"
    source = "input"
    has_scale = True

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "relu") -> None:
        super().__init__(sizes, rank, activation)
        self.scale = 4.0

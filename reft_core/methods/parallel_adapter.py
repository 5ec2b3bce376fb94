"""Parallel adapter: a bottleneck beside a sublayer. He et al. 2022 (arXiv 2110.04366), table 1."""

from __future__ import annotations

from reft_core.methods.bottleneck import Bottleneck


class ParallelAdapter(Bottleneck):
    """Δ(x) = act(x·W_down + b)·W_up + b', x a sublayer's input, added to its output."""

    method = "parallel_adapter"
    equation = "act(xW_down + b)W_up + b'"
    citation = "arXiv 2110.04366, table 1"
    source = "input"

"""Series adapter: a bottleneck behind a sublayer. Houlsby et al. 2019 (arXiv 1902.00751)."""

from __future__ import annotations

from torch import nn

from reft_core.edits import Activation
from reft_core.methods.base import SiteSizes
from reft_core.methods.bottleneck import Bottleneck

_INIT_STD = 0.01


class SeriesAdapter(Bottleneck):
    """Δ(h) = act(h·W_down + b)·W_up + b', h a sublayer's output (Houlsby et al. 2019).

    Starts as in the paper's experiments, near the identity: both matrices drawn from N(0, 0.01²),
    cut off at two standard deviations, both biases zero.
    """

    method = "series_adapter"
    equation = "act(hW_down + b)W_up + b'"
    citation = "arXiv 2110.04366, table 1; arXiv 1902.00751"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "relu") -> None:
        super().__init__(sizes, rank, activation)
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)

"""Series adapter: a bottleneck behind a sublayer. Houlsby et al. 2019 (arXiv 1902.00751)."""

from __future__ import annotations

from reft_core.methods.bottleneck import Bottleneck


class SeriesAdapter(Bottleneck):
    """Δ(h) = act(h·W_down + b)·W_up + b', h a sublayer's output (Houlsby et al. 2019).

    W_up and both biases start at zero, so the untrained adapter changes nothing.
    """

    method = "series_adapter"
    equation = "act(hW_down + b)W_up + b'"
    citation = "arXiv 2110.04366, table 1; arXiv 1902.00751"

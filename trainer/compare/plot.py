"""Quality against the number of trained parameters, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from trainer.compare.run import Comparison
from trainer.compare.table import Row

_STYLE = {
    "own weights": "s",
    "head": "D",
    "prompt": "o",
    "text": "o",
    "every token": "^",
    "prefix": "v",
}


def to_png(comparison: Comparison, rows: Sequence[Row]) -> bytes:
    """Parameters on a logarithmic axis, intervals as bars; untrained methods are lines across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    factor = 100 if comparison.metric.percent else 1
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in rows:
        if row.quality is None:
            continue
        value = factor * row.quality.value
        if not row.num_parameters:
            axes.axhline(value, linestyle=":", color="grey")
            where = ("axes fraction", "data")
            axes.annotate(row.label, (0.01, value), xycoords=where, va="bottom", color="grey")
            continue
        below, above = row.quality.value - row.quality.low, row.quality.high - row.quality.value
        axes.errorbar(
            row.num_parameters,
            value,
            yerr=[[max(0.0, factor * below)], [max(0.0, factor * above)]],
            fmt=_STYLE.get(row.serving_scope, "o"),
            capsize=3,
        )
        axes.annotate(
            row.label,
            (row.num_parameters, value),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(comparison.metric.name + (", %" if factor == 100 else ""))
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()

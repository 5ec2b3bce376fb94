"""Line charts as SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40
_LOG_FROM = 30
"""Ratio of largest to smallest value from which the vertical axis is logarithmic."""


@dataclass(frozen=True)
class Series:
    """One line: its name, the class that colours it, and points of rising x."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    """Whether each point is marked, with its numbers to be read on pointing at it."""


def line_chart(
    title: str, unit: str, series: Sequence[Series], mark: float | None = None
) -> Markup:
    """The chart of ``series`` over steps, safe to put into a page.

    ``unit`` says what the vertical axis counts; ``mark`` draws an upright line at that step.
    """
    ys = [y for line in series for _, y in line.points]
    is_log = min(ys) > 0 and max(ys) / min(ys) >= _LOG_FROM
    y_ticks = _log_ticks(min(ys), max(ys)) if is_log else _ticks(min(ys), max(ys))
    x_ticks = _ticks(0, max(x for line in series for x, _ in line.points))
    plot = _Plot(x_ticks[-1], y_ticks[0], y_ticks[-1], is_log)
    parts = [_horizontal(plot, y) for y in y_ticks] + [_below(plot, x) for x in x_ticks]
    if mark is not None:
        x = plot.x(mark)
        parts.append(f'<line class="kept" x1="{x}" x2="{x}" y1="{_TOP}" y2="{plot.bottom}"/>')
    for line in series:
        points = " ".join(f"{plot.x(x)},{plot.y(y)}" for x, y in line.points)
        parts.append(f'<polyline class="{line.css}" points="{points}"/>')
        if line.dots:
            parts += [_dot(plot, line, x, y) for x, y in line.points]
    axis = f"{unit}, logarithmic" if is_log else unit
    middle = (_TOP + plot.bottom) / 2
    parts.append(
        f'<text class="axis" x="{(_LEFT + plot.right) / 2}" y="{_HEIGHT - 6}">step</text>'
        f'<text class="axis" transform="rotate(-90 12 {middle})" x="12" y="{middle}">'
        f"{escape(axis)}</text>"
    )
    label = escape(f"{title}: {', '.join(line.name for line in series)}, by step")
    inside = "".join(parts)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{inside}</svg>"
    )


@dataclass(frozen=True)
class _Plot:
    """From steps and values to places in the drawing."""

    last_x: float
    low: float
    high: float
    is_log: bool
    right: int = _WIDTH - _RIGHT
    bottom: int = _HEIGHT - _BOTTOM

    def x(self, value: float) -> float:
        return round(_LEFT + (self.right - _LEFT) * value / self.last_x, 1)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.bottom - (self.bottom - _TOP) * (value - low) / (high - low), 1)


def _horizontal(plot: _Plot, value: float) -> str:
    y = plot.y(value)
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{plot.right}" y1="{y}" y2="{y}"/>'
        f'<text class="tick y" x="{_LEFT - 6}" y="{y + 4}">{value:g}</text>'
    )


def _below(plot: _Plot, value: float) -> str:
    return f'<text class="tick x" x="{plot.x(value)}" y="{plot.bottom + 16}">{value:g}</text>'


def _dot(plot: _Plot, line: Series, x: float, y: float) -> str:
    told = escape(f"{line.name} at step {x:g}: {y:.4g}")
    return (
        f'<circle class="{line.css}" cx="{plot.x(x)}" cy="{plot.y(y)}" r="3.5">'
        f"<title>{told}</title></circle>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at most ``low`` to at least ``high``."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 5))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * place, 12) for place in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around both."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]

"""Numbers and tables as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def shown(estimate: Mapping[str, float], percent: bool, *, signed: bool = False) -> str:
    """``94.2 ± 1.6``: a value and half the width of its interval."""
    half = (estimate["high"] - estimate["low"]) / 2
    return f"{number(estimate['value'], percent, signed=signed)} ± {number(half, percent)}"


def number(value: float, percent: bool, *, signed: bool = False) -> str:
    """In percent with one digit, else with three."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""How repeats are summed up: least, median, greatest."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

Spread = list[float]
"""Smallest, median and largest."""


def spread(values: Sequence[float], digits: int) -> Spread:
    """Of the values, rounded."""
    return [round(value, digits) for value in (min(values), median(values), max(values))]


def spread_of_ratios(
    numerators: Sequence[float], denominators: Sequence[float], digits: int = 3
) -> Spread:
    """Of the ratios of the pairs, rounded."""
    pairs = zip(numerators, denominators, strict=True)
    return spread([one / other for one, other in pairs], digits)

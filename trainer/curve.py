"""A number of each step, in bounded memory however long a run is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

MOST_POINTS = 1024


@dataclass
class Curve:
    """Means over runs of steps; the runs double in length whenever there are many of them."""

    stride: int = 1
    """Steps of one point."""
    points: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    """Steps that do not make a whole point yet."""

    def extend(self, values: Iterable[float]) -> None:
        """Add the numbers of the next steps."""
        for value in values:
            self.rest.append(value)
            if len(self.rest) < self.stride:
                continue
            self.points.append(fmean(self.rest))
            self.rest = []
            if len(self.points) == MOST_POINTS:
                pairs = zip(self.points[::2], self.points[1::2], strict=True)
                self.points = [(first + second) / 2 for first, second in pairs]
                self.stride *= 2

    def steps(self) -> tuple[tuple[int, float], ...]:
        """The last step of each point, from 1, and the mean up to it since the one before."""
        found = [(self.stride * (place + 1), point) for place, point in enumerate(self.points)]
        if self.rest:
            found.append((self.stride * len(self.points) + len(self.rest), fmean(self.rest)))
        return tuple(found)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this: the arguments that make it again."""
        return asdict(self)

"""A token bucket: so much a minute on average, and at most a minute's worth at once."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
_MINUTE_S = 60.0


class Bucket:
    """Fills steadily up to ``per_minute``. May be overdrawn; what is owed is waited for.

    Belongs to the event loop: nothing is locked.
    """

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        assert per_minute > 0, "no limit means no bucket"
        self.capacity = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What could be taken now; negative while overdrawn."""
        now = self._clock()
        gained = (now - self._at) * self.capacity / _MINUTE_S
        self._level = min(float(self.capacity), self._level + gained)
        self._at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until ``amount``, at most the capacity, can be taken; 0 if it can be now."""
        assert amount <= self.capacity, "waiting never helps"
        return max(0.0, amount - self.level) * _MINUTE_S / self.capacity

    def take(self, amount: float) -> None:
        """Take ``amount``, be there enough or not. A negative amount gives back."""
        self._level = min(float(self.capacity), self.level - amount)

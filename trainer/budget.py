"""Memory that what need not be computed again may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Budget:
    """Bytes, shared by all that is kept."""

    max_bytes: int
    num_bytes: int = 0
    """Taken so far."""

    def take(self, num_bytes: int) -> bool:
        """Whether there was room for so many more, which are now taken."""
        if self.num_bytes + num_bytes > self.max_bytes:
            return False
        self.num_bytes += num_bytes
        return True

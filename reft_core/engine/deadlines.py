"""When open requests are to end."""

from __future__ import annotations

import heapq

_MOST_STALE = 64
"""Entries of requests that have ended, beyond the number of open ones, that are put up with."""


class Deadlines:
    """Due times by request id.

    Holds no request: one that has ended long before it is due must not be kept in memory until
    then, with its tokens, its caller and its adapter. Takes time logarithmic in the open requests.
    """

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """Entries held, for requests that are open or were."""
        return len(self._heap)

    def add(self, request_id: str, due: float) -> None:
        """Note that a request is due at ``due``, on the clock of :meth:`pop_overdue`."""
        self._due[request_id] = due
        heapq.heappush(self._heap, (due, request_id))

    def remove(self, request_id: str) -> None:
        """Forget a request; no-op if it has no deadline."""
        if self._due.pop(request_id, None) is None:
            return
        if len(self._heap) > 2 * len(self._due) + _MOST_STALE:
            self._heap = [(due, other) for other, due in self._due.items()]
            heapq.heapify(self._heap)

    def pop_overdue(self, now: float) -> list[str]:
        """The requests that were due by ``now``, earliest first; they are forgotten."""
        overdue = []
        while self._heap and self._heap[0][0] <= now:
            due, request_id = heapq.heappop(self._heap)
            if self._due.get(request_id) == due:
                del self._due[request_id]
                overdue.append(request_id)
        return overdue

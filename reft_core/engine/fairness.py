"""Who waits, and who is next: a tenant's most urgent, of the flow that has been served least.

A flow is what one tenant asks of one adapter (or of the base model). Each flow has a counter of
the tokens computed for it; the lowest is served next, so a flood from one adapter cannot starve
another, however rare. A flow that comes back after a pause starts at the least counter of those
present: it earned no credit while away. This is the virtual token counter of Sheng et al.,
"Fairness in Serving Large Language Models" (arXiv 2401.00588), with all tokens weighed alike.

Priorities compare within a tenant alone: every request may name one, so between tenants they would
be a way around fairness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from reft_core.engine.sequence import Flow, Sequence


class FairQueue:
    """The sequences waiting for a slot, and the counters of all flows present."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[int, dict[Flow, deque[Sequence]]]] = {}
        self._served: dict[Flow, float] = {}
        self._present: dict[Flow, int] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no particular order."""
        for priorities in self._waiting.values():
            for flows in priorities.values():
                for queue in flows.values():
                    yield from queue

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind those of its flow."""
        flow = sequence.flow
        if flow not in self._present:
            self._served[flow] = min(self._served.values(), default=0.0)
        self._present[flow] = self._present.get(flow, 0) + 1
        self._queue(sequence).append(sequence)
        self._length += 1

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that ran and lost its slot, before those of its flow."""
        self._queue(sequence).appendleft(sequence)
        self._length += 1

    def peek(self) -> Sequence | None:
        """Who is next: of each tenant's lowest priority, whoever already ran; then fairly."""
        if not self._length:
            return None
        urgent = (priorities[min(priorities)] for priorities in self._waiting.values())
        heads = [queue[0] for flows in urgent for queue in flows.values()]
        return min(heads, key=lambda s: (not s.was_admitted, self._served[s.flow], s.submitted_at))

    def take(self, sequence: Sequence) -> None:
        """Take a sequence out, because it is admitted or ends."""
        tenant, priority = sequence.request.tenant, sequence.request.priority
        flows = self._waiting[tenant][priority]
        queue = flows[sequence.flow]
        queue.remove(sequence)
        if not queue:
            del flows[sequence.flow]
        if not flows:
            del self._waiting[tenant][priority]
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        self._length -= 1

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens computed for a sequence."""
        self._served[sequence.flow] += num_tokens

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence has ended; a flow without any is forgotten."""
        flow = sequence.flow
        self._present[flow] -= 1
        if not self._present[flow]:
            del self._present[flow], self._served[flow]

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        priorities = self._waiting.setdefault(sequence.request.tenant, {})
        flows = priorities.setdefault(sequence.request.priority, {})
        return flows.setdefault(sequence.flow, deque())

"""The prefill of one step while the scheduler puts it together."""

from __future__ import annotations

from dataclasses import dataclass, field

from reft_core.engine.sequence import Sequence
from reft_core.engine.sharing import Chunk, Common, Lead, common, find_lead

LEAST_TRUNK = 1 / 8
"""Share of the layers for whose sake sequences are prefilled at one pace. Then all of them get
their first token at the end, where one after the other the first had got its own much earlier."""
LEAST_PACE = 8
"""Fewest tokens a step that such sequences advance by; if there are more of them, some wait."""
MOST_SCORED = 256
"""Positions of prompts whose logits one step computes, each a number for every token of the
vocabulary, for requests that want log-probabilities of their prompt."""


MOST_BEYOND = 1 / 4
"""Share of the budget that may be exceeded to complete prompts that follow another one. What they
have of their own is short, and a forward for it alone costs as much as for several times as many
rows."""


@dataclass
class Packing:
    """Chunks that one forward computes, and what may still be added."""

    num_layers: int
    budget: int
    """Rows times layers that may still be computed; negative if it was exceeded."""
    branching: bool
    """Whether sequences may share lower layers only."""
    chunks: list[Chunk] = field(default_factory=list)
    _common: dict[tuple[Sequence, Sequence], Common] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._most_beyond = int(MOST_BEYOND * self.budget)

    def common(self, one: Sequence, other: Sequence) -> Common:
        """What two sequences have in common; nothing changes that while a step is packed."""
        pair = (one, other)
        if pair not in self._common:
            self._common[pair] = common(one, other)
        return self._common[pair]

    def has_something_for(self, sequence: Sequence) -> bool:
        """Whether a sequence that has not begun can begin in this step."""
        return self.budget >= self.num_layers or any(
            self.common(sequence, chunk.sequence).same > sequence.num_computed
            for chunk in self.chunks
        )

    def pace_of(self, sequence: Sequence, others: list[Sequence]) -> tuple[int, list[Sequence]]:
        """Tokens by which a sequence can advance in this step together with ``others``, whose
        lower layers are its own; and those of them for whom that is enough."""
        cost, together = self.num_layers, []
        for other in others:
            more = cost + self.num_layers - self.common(sequence, other).depth
            if self.budget // more < LEAST_PACE:
                break
            together.append(other)
            cost = more
        return self.budget // cost, together

    def may_share_trunk(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether two sequences would share lower layers, and those only, of what comes next in
        the first; and enough of them to be prefilled at one pace."""
        shared = self.common(sequence, other)
        return (
            self.branching
            and other.request.priority == sequence.request.priority
            and shared.same <= sequence.num_computed < shared.alike
            and shared.depth >= LEAST_TRUNK * self.num_layers
        )

    def put(self, sequence: Sequence, pace: int | None = None) -> Chunk | None:
        """Add the next chunk of a sequence, of at most ``pace`` tokens, as far as the budget
        goes. It follows the chunk that saves it most."""
        start, target = sequence.num_computed, sequence.prefill_target
        if pace is not None:
            target = min(target, start + pace)
        if sequence.is_scoring:
            num_scored = sum(len(chunk.scored) for chunk in self.chunks)
            target = min(target, max(start, sequence.first_read) + MOST_SCORED - num_scored)
        lead = self.lead_of(sequence)
        costs = [(target, self.num_layers)]
        if lead is not None:
            if lead.alike == lead.chunk.end and not lead.chunk.completes_prompt:
                target = min(target, lead.alike)  # there is more to follow in the next step
            costs = [(lead.same, 0), (lead.alike, self.num_layers - lead.depth), *costs]
        completes = lead is not None and target == sequence.prefill_target
        end = self._spend(start, target, costs, beyond=self._most_beyond if completes else 0)
        if end == start:
            return None
        chunk = Chunk(sequence, start, end, lead.up_to(end) if lead else None)
        self.chunks.append(chunk)
        return chunk

    def _spend(self, start: int, target: int, costs: list[tuple[int, int]], *, beyond: int) -> int:
        """Where a chunk from ``start`` ends, whose tokens up to each position cost so much. The
        budget is exceeded by ``beyond`` at most, and only to reach the target."""
        stretches, at = [], start
        for until, cost in costs:
            length = max(0, min(until, target) - at)
            stretches.append((length, cost))
            at += length
        whole = sum(length * cost for length, cost in stretches)
        if whole <= self.budget + beyond:
            self.budget -= whole
            return at
        end = start
        for length, cost in stretches:
            affordable = min(length, max(0, self.budget) // cost) if cost else length
            self.budget -= affordable * cost
            end += affordable
            if affordable < length:
                break
        return end

    def lead_of(self, sequence: Sequence) -> Lead | None:
        """The chunk that it saves most to follow."""
        known = [self.common(sequence, chunk.sequence) for chunk in self.chunks]
        return find_lead(
            sequence, zip(self.chunks, known, strict=True), self.num_layers, self.branching
        )

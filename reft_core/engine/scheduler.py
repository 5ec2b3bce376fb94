"""Decides which sequences run, in which slot, and how much of them a step computes.

Knows token counts and slots; computes nothing. Running sequences are kept dense: ``running[i]``
owns slot i, so a decode batch is always the first rows of the KV store.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from reft_core.engine.config import EngineConfig
from reft_core.engine.fairness import FairQueue
from reft_core.engine.kv import SlotKV
from reft_core.engine.prefix_cache import LEAST_MATCH, PrefixCache
from reft_core.engine.sequence import Sequence
from reft_core.engine.sharing import Chunk, Lead, common, find_lead

_HEADROOM = 16
"""Tokens that each running sequence may still grow by when another is admitted, so that the
one admitted last does not lose its slot at once."""
_MOST_SCORED = 256
"""Positions of prompts whose logits one step computes, each a number for every token of the
vocabulary, for requests that want log-probabilities of their prompt."""


_LEAST_TRUNK = 1 / 8
"""Share of the layers for whose sake sequences are prefilled at one pace, and all of them get
their first token at the end, where otherwise the first of them got its own much earlier."""
_LEAST_PACE = 8
"""Fewest tokens a step that such sequences advance by; of more sequences, the rest wait."""


@dataclass
class _Step:
    """The prefill of one step while it is put together."""

    budget: int
    """Rows times layers that may still be computed."""
    branching: bool
    """Whether sequences may share lower layers only."""
    num_scored: int = 0
    """Positions whose logits it computes for the log-probabilities of prompts."""
    chunks: list[Chunk] = field(default_factory=list)


class Scheduler:
    """Slots go fairly (see :mod:`fairness`), prefill tokens by priority and admission.

    All running sequences together hold at most ``config.kv_tokens`` tokens. When they grow
    beyond, the one admitted last among the least urgent gives up its slot; it is computed again
    later, as far as the prefix cache does not remember it.
    """

    def __init__(
        self,
        config: EngineConfig,
        kv: SlotKV,
        cache: PrefixCache,
        can_branch: Callable[[Sequence], bool] = lambda _: False,
    ) -> None:
        self._max_prefill_tokens = config.max_prefill_tokens
        self._can_branch = can_branch
        self.kv_tokens = config.kv_tokens or kv.num_slots * kv.slot_len
        self._kv = kv
        self._cache = cache
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_taken_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for a slot."""
        self.waiting.add(sequence)

    def next_prefill(self) -> list[Chunk]:
        """Admit what fits, then choose the chunks of this step, the most urgent first.

        What a sequence has in common with another one of the step is computed once (see
        :mod:`sharing`) and counted once in ``max_prefill_tokens``; layers shared in part count
        in part.
        """
        self._admit()
        unfinished = [s for s in sorted(self.running, key=_urgency) if not s.is_prefilled]
        step = _Step(
            self._max_prefill_tokens * self._kv.num_layers,
            branching=all(self._can_branch(sequence) for sequence in unfinished),
        )
        while unfinished:
            sequence = unfinished.pop(0)
            if not self._start(sequence, step):
                continue
            lead = self._find_lead(sequence, step)
            pace: int | None = None
            companions: list[Sequence] = []
            if lead is None and step.branching:
                pace, companions = self._companions(sequence, unfinished, step)
            self._put(sequence, lead, step, pace)
            for companion in companions:
                unfinished.remove(companion)
                self._put(companion, self._find_lead(companion, step), step, pace)
        return step.chunks

    def next_decode(self) -> list[Sequence]:
        """Rows 0..B-1 of this step's decode: every sequence with a prefilled prompt.

        Slots are dense but prompts finish in any order, so rows in between may belong to
        sequences that are not ready; the runner leaves those idle.
        """
        while self._num_reserved > self.kv_tokens:
            self._preempt(max(self.running, key=_urgency))
        num_rows = max((s.slot + 1 for s in self.running if s.is_prefilled), default=0)
        return self.running[:num_rows]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its slot."""
        if sequence.slot < 0:
            self.waiting.take(sequence)
        else:
            self._vacate(sequence)
        self.waiting.leave(sequence)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens computed for a sequence, towards its flow's share."""
        self.waiting.charge(sequence, num_tokens)

    @property
    def _num_reserved(self) -> int:
        """Tokens that the running sequences hold after this step's decode."""
        return sum(len(sequence.token_ids) for sequence in self.running)

    def _admit(self) -> None:
        """Give slots to whoever is next, as long as there are slots and tokens."""
        while len(self.running) < self._kv.num_slots and (sequence := self.waiting.peek()):
            headroom = _HEADROOM * len(self.running)
            wanted = self._num_reserved + len(sequence.token_ids) + headroom
            if self.running and wanted > self.kv_tokens:
                return
            self.waiting.take(sequence)
            sequence.slot = len(self.running)
            if not sequence.was_admitted:
                sequence.admitted_at = time.monotonic()
                self.charge(sequence, len(sequence.token_ids))
            self.running.append(sequence)

    def _start(self, sequence: Sequence, step: _Step) -> bool:
        """Have a sequence's slot hold what is known of its beginning.

        False if this step has nothing for it; then that is put off.
        """
        if sequence.has_started:
            return True
        if step.budget < self._kv.num_layers and not any(
            common(sequence, chunk.sequence).same > sequence.num_computed for chunk in step.chunks
        ):
            return False
        sequence.has_started = True
        others = [other for other in self.running if other is not sequence]
        limit = sequence.first_read
        known = [min(common(sequence, s).same, s.num_computed, limit) for s in others]
        best = max(known, default=0)
        taken = self._cache.restore(sequence, beyond=best)
        if not taken and best >= max(LEAST_MATCH, sequence.num_virtual + 1):
            self._kv.move(others[known.index(best)].slot, sequence.slot, best)
            taken = best
        if taken:
            self._note_taken(sequence, taken - sequence.num_computed)
            sequence.num_computed = taken
        return True

    def _companions(
        self, sequence: Sequence, others: list[Sequence], step: _Step
    ) -> tuple[int | None, list[Sequence]]:
        """Sequences to be prefilled with this one at one pace, because only then are the layers
        below their edits computed once; and the pace, in tokens a step."""
        num_layers = self._kv.num_layers
        found: list[Sequence] = []
        cost = num_layers
        for other in others:
            shared = common(sequence, other)
            if (
                other.request.priority != sequence.request.priority
                or shared.same > sequence.num_computed  # it follows without computing anything
                or shared.alike <= sequence.num_computed
                or shared.depth < _LEAST_TRUNK * num_layers
                or not self._start(other, step)
                or other.num_computed != sequence.num_computed
            ):
                continue
            more = cost + num_layers - shared.depth
            if step.budget // more < _LEAST_PACE:
                break
            found.append(other)
            cost = more
        return (step.budget // cost, found) if found else (None, found)

    def _find_lead(self, sequence: Sequence, step: _Step) -> Lead | None:
        return find_lead(sequence, step.chunks, self._kv.num_layers, branching=step.branching)

    def _put(self, sequence: Sequence, lead: Lead | None, step: _Step, pace: int | None) -> None:
        """Add a sequence's chunk to a step, as far as the budget goes."""
        num_layers, start = self._kv.num_layers, sequence.num_computed
        target = sequence.prefill_target if pace is None else start + pace
        target = min(target, sequence.prefill_target)
        if sequence.is_scoring:
            most = _MOST_SCORED - step.num_scored
            target = min(target, max(start, sequence.first_read) + most)
        costs = [(target, num_layers)]
        if lead is not None:
            if lead.alike == lead.chunk.end and not lead.chunk.completes_prompt:
                target = min(target, lead.alike)  # there is more to follow in the next step
            costs = [(lead.same, 0), (lead.alike, num_layers - lead.depth), *costs]
        end = start
        for until, cost in costs:
            wanted = max(0, min(until, target) - end)
            length = min(wanted, step.budget // cost) if cost else wanted
            step.budget -= length * cost
            end += length
            if length < wanted:
                break
        if end > start:
            chunk = Chunk(sequence, start, end, lead.up_to(end) if lead else None)
            step.chunks.append(chunk)
            step.num_scored += len(chunk.scored)
            self._note_taken(sequence, chunk.num_shared)

    def _note_taken(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens that need not be computed for a sequence."""
        sequence.take_over(num_tokens)
        self.num_taken_tokens += num_tokens

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot away; its tokens stay, its keys and values go."""
        self.num_preemptions += 1
        self._cache.store(sequence, tail=True)
        self._vacate(sequence)
        sequence.restart()
        self.waiting.put_back(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Free a slot. The last running sequence moves into it.

        Memory that no sequence owns is always zero.
        """
        last = self.running.pop()
        self._clear(sequence)
        if last is not sequence:
            self._kv.move(last.slot, sequence.slot, last.num_computed)
            self._clear(last)
            self.running[sequence.slot] = last
            last.slot = sequence.slot
        sequence.slot = -1

    def _clear(self, sequence: Sequence) -> None:
        """Zero whatever a sequence may have stored; an idle row stores one token ahead."""
        self._kv.clear(sequence.slot, min(len(sequence.token_ids) + 1, self._kv.slot_len))


def _urgency(sequence: Sequence) -> tuple[int, float]:
    """Sorts the most urgent sequence first, and last the one that loses its slot first."""
    return sequence.request.priority, sequence.admitted_at

"""Decides which sequences run, in which slot, and how much of them a step computes.

Knows token counts and slots; computes nothing. Running sequences are kept dense: ``running[i]``
owns slot i, so a decode batch is always the first rows of the KV store.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from reft_core.engine.config import EngineConfig
from reft_core.engine.fairness import FairQueue
from reft_core.engine.kv import SlotKV
from reft_core.engine.packing import Packing
from reft_core.engine.prefix_cache import PrefixCache
from reft_core.engine.sequence import Sequence
from reft_core.engine.sharing import Chunk

_HEADROOM = 16
"""Tokens that each running sequence may still grow by when another is admitted, so that the
one admitted last does not lose its slot at once."""


class Scheduler:
    """Slots go fairly (see :mod:`fairness`), prefill tokens by priority and admission.

    All running sequences together hold at most ``config.kv_tokens`` tokens. When they grow
    beyond, the one admitted last among its tenant's least urgent gives up its slot; it is computed
    again later, as far as the prefix cache does not remember it.
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
        self._num_foreign_tokens = 0

    @property
    def num_foreign_tokens(self) -> int:
        """How many of the taken tokens requests with other adapters, or with none, had left."""
        return self._num_foreign_tokens + self._cache.num_foreign_tokens

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
        unfinished = _most_urgent_first(s for s in self.running if not s.is_prefilled)
        packing = Packing(
            self._kv.num_layers,
            budget=self._max_prefill_tokens * self._kv.num_layers,
            branching=all(self._can_branch(sequence) for sequence in unfinished),
        )
        while unfinished:
            sequence = unfinished.pop(0)
            if not self._start(sequence, packing):
                continue
            pace, companions = self._companions(sequence, unfinished, packing)
            self._put(sequence, packing, pace)
            for companion in companions:
                unfinished.remove(companion)
                self._put(companion, packing, pace)
        return packing.chunks

    def next_decode(self) -> list[Sequence]:
        """Rows 0..B-1 of this step's decode: every sequence with a prefilled prompt.

        Slots are dense but prompts finish in any order, so rows in between may belong to
        sequences that are not ready; the runner leaves those idle.
        """
        while self._num_reserved > self.kv_tokens:
            self._preempt(_most_urgent_first(self.running)[-1])
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

    def start_over(self, sequence: Sequence) -> bool:
        """Have a running sequence computed again, with nothing taken over from others, because
        that may be why its numbers are not finite. False if it took nothing over.

        An adapter that overflows can spoil what its sequence computed before the edit: attention
        multiplies masked values by zero, and they may be NaN.
        """
        if not sequence.num_taken:
            return False
        self._clear(sequence)
        sequence.provenance = None
        sequence.restart()
        return True

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

    def _start(self, sequence: Sequence, packing: Packing) -> bool:
        """Have a sequence's slot hold what is known of its beginning.

        False if this step has nothing for it; then that is put off.
        """
        if sequence.has_started:
            return True
        if not packing.has_something_for(sequence):
            return False
        others = [s for s in self.running if s is not sequence and s.num_computed]
        limit, has = sequence.first_read, sequence.num_computed
        known = [min(packing.common(sequence, s).same, s.num_computed, limit) for s in others]
        best = max(known, default=0)
        taken = self._cache.restore(sequence, beyond=max(best, has))
        if not taken and best > max(sequence.num_virtual, has):
            source = others[known.index(best)]
            self._kv.move(source.slot, sequence.slot, best)
            taken = best
            self._note_source(sequence, source, taken - has)
        if taken:
            self._note_taken(sequence, taken - has)
            sequence.num_computed = taken
        return True

    def _companions(
        self, sequence: Sequence, others: list[Sequence], packing: Packing
    ) -> tuple[int | None, list[Sequence]]:
        """Sequences to be prefilled with this one at one pace, because only then are the layers
        below their edits computed once; and the pace, in tokens."""
        if packing.lead_of(sequence) is not None:
            return None, []
        found = [
            other
            for other in others
            if packing.may_share_trunk(sequence, other)
            and self._start(other, packing)
            and other.num_computed == sequence.num_computed
        ]
        pace, together = packing.pace_of(sequence, found)
        return (pace, together) if together else (None, [])

    def _put(self, sequence: Sequence, packing: Packing, pace: int | None) -> None:
        chunk = packing.put(sequence, pace)
        if chunk is not None:
            sequence.has_started = True
            self._note_taken(sequence, chunk.num_shared)
            if chunk.lead is not None:
                self._note_source(sequence, chunk.lead.chunk.sequence, chunk.num_shared)

    def _note_taken(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens that need not be computed for a sequence."""
        sequence.take_over(num_tokens)
        self.num_taken_tokens += num_tokens

    def _note_source(self, sequence: Sequence, source: Sequence, num_tokens: int) -> None:
        """Count tokens taken from another running sequence, if it has other adapters."""
        if source.adapters != sequence.adapters:
            self._num_foreign_tokens += num_tokens

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


def _most_urgent_first(sequences: Iterable[Sequence]) -> list[Sequence]:
    """As they were admitted, but that a tenant's most urgent take the places of its earliest. The
    last one loses its slot first.
    """
    in_order = sorted(sequences, key=lambda s: s.admitted_at)
    own: dict[str, deque[Sequence]] = {}
    for sequence in sorted(in_order, key=lambda s: s.request.priority):
        own.setdefault(sequence.request.tenant, deque()).append(sequence)
    return [own[sequence.request.tenant].popleft() for sequence in in_order]

"""Decides which sequences run, in which slot, and how much of them a step computes.

Knows token counts and slots; computes nothing. Running sequences are kept dense: ``running[i]``
owns slot i, so a decode batch is always the first rows of the KV store.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from reft_core.engine.config import EngineConfig
from reft_core.engine.fairness import FairQueue
from reft_core.engine.kv import SlotKV
from reft_core.engine.prefix_cache import LEAST_MATCH, PrefixCache
from reft_core.engine.provenance import BLOCK_TOKENS
from reft_core.engine.sequence import Sequence

_HEADROOM = 16
"""Tokens that each running sequence may still grow by when another is admitted, so that the
one admitted last does not lose its slot at once."""
_MOST_SCORED = 256
"""Positions of prompts whose logits one step computes, each a number for every token of the
vocabulary, for requests that want log-probabilities of their prompt."""


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end-1 of a sequence, to be prefilled in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes_prompt(self) -> bool:
        """Whether the sequence's next token can be sampled after this chunk."""
        return self.end == self.sequence.prefill_target

    @property
    def wants_token(self) -> bool:
        """Whether a token is to be sampled after this chunk."""
        return self.completes_prompt and self.sequence.request.params.max_tokens > 0

    @property
    def scored(self) -> range:
        """Positions whose logits tell the log-probability of the prompt's next token."""
        sequence = self.sequence
        if not sequence.is_scoring:
            return range(0)
        return range(max(self.start, sequence.first_read), min(self.end, sequence.prompt_end - 1))


class Scheduler:
    """Slots go fairly (see :mod:`fairness`), prefill tokens by priority and admission.

    All running sequences together hold at most ``config.kv_tokens`` tokens. When they grow
    beyond, the one admitted last among the least urgent gives up its slot; it is computed again
    later, as far as the prefix cache does not remember it.
    """

    def __init__(self, config: EngineConfig, kv: SlotKV, cache: PrefixCache) -> None:
        self._max_prefill_tokens = config.max_prefill_tokens
        self.kv_tokens = config.kv_tokens or kv.num_slots * kv.slot_len
        self._kv = kv
        self._cache = cache
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for a slot."""
        self.waiting.add(sequence)

    def next_prefill(self) -> list[Chunk]:
        """Admit what fits, then choose the chunks of this step, the most urgent first.

        A sequence whose beginning another one is computing just now waits for it, and then
        takes it from the prefix cache.
        """
        self._admit()
        budget = self._max_prefill_tokens
        chunks: list[Chunk] = []
        coming: set[bytes] = set()
        num_scored = 0
        unfinished = (sequence for sequence in self.running if not sequence.is_prefilled)
        for sequence in sorted(unfinished, key=_urgency):
            if budget == 0:
                break
            if not sequence.has_started:
                if self._should_wait(sequence, coming):
                    continue
                self._cache.restore(sequence)
                sequence.has_started = True
            start = sequence.num_computed
            end = min(sequence.prefill_target, start + budget)
            if sequence.is_scoring:
                end = min(end, max(start, sequence.first_read) + _MOST_SCORED - num_scored)
                if end == start:
                    continue
            chunks.append(Chunk(sequence, start, end))
            num_scored += len(chunks[-1].scored)
            budget -= end - start
            if self._cache.num_rows:
                coming.update(sequence.prompt_block_names)
        return chunks

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

    def _should_wait(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """Whether a sequence's beginning is being computed by a more urgent one."""
        if sequence.first_read < LEAST_MATCH:
            return False  # it could take nothing
        names = sequence.prompt_block_names
        num_known = self._cache.num_known(names)
        num_coming = num_known
        while num_coming < len(names) and names[num_coming] in coming:
            num_coming += 1
        return (num_coming - num_known) * BLOCK_TOKENS >= LEAST_MATCH

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

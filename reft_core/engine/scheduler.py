"""Decides which sequences run, in which slot, and how much of them a step computes.

Knows token counts and slots; touches no model tensors. Running sequences are kept dense:
``running[i]`` owns slot i, so a decode batch is always the first rows of the KV store.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from reft_core.engine.config import EngineConfig
from reft_core.engine.kv import SlotKV
from reft_core.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end-1 of a sequence's prompt, to be prefilled in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes_prompt(self) -> bool:
        """Whether the sequence's first token can be sampled after this chunk."""
        return self.end == self.sequence.prefill_len


class Scheduler:
    """First come, first served: slots by arrival, then prefill tokens by admission."""

    def __init__(self, config: EngineConfig, kv: SlotKV) -> None:
        self._max_prefill_tokens = config.max_prefill_tokens
        self._kv = kv
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for a slot."""
        self.waiting.append(sequence)

    def next_prefill(self) -> list[Chunk]:
        """Admit what fits, then choose the prompt chunks of this step, oldest first."""
        while self.waiting and len(self.running) < self._kv.num_slots:
            sequence = self.waiting.popleft()
            sequence.slot = len(self.running)
            sequence.admitted_at = time.monotonic()
            self.running.append(sequence)
        budget = self._max_prefill_tokens
        chunks: list[Chunk] = []
        unfinished = (sequence for sequence in self.running if not sequence.is_prefilled)
        for sequence in sorted(unfinished, key=lambda s: s.admitted_at):
            start = sequence.num_computed
            end = min(sequence.prefill_len, start + budget)
            if start < end:
                chunks.append(Chunk(sequence, start, end))
                budget -= end - start
        return chunks

    def next_decode(self) -> list[Sequence]:
        """Rows 0..B-1 of this step's decode: every sequence with a prefilled prompt.

        Slots are dense but prompts finish in any order, so rows in between may belong to
        sequences that are not ready; the runner leaves those idle.
        """
        num_rows = max((s.slot + 1 for s in self.running if s.is_prefilled), default=0)
        return self.running[:num_rows]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its slot.

        The last running sequence moves into the freed slot. Memory that no sequence owns is
        always zero.
        """
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
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

"""One request while the engine runs it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from reft_core.batch import PromptEdits
from reft_core.engine.interface import OutputSink, Request, Timings


@dataclass(eq=False)
class Sequence:
    """A request's tokens, progress and place in the KV store."""

    request: Request
    sink: OutputSink
    edits: PromptEdits | None
    stop_ids: frozenset[int]
    """Tokens that end it: the request's own, and the model's unless it ignores them."""
    token_ids: list[int]
    """A placeholder for each virtual token, the prompt, then generated tokens."""
    slot: int = -1
    """Row of the KV store; -1 while waiting. Owned by the scheduler."""
    num_computed: int = 0
    """Tokens whose keys and values are in the slot."""
    generator: torch.Generator | None = None
    """Source of randomness when the request has a seed."""
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def num_virtual(self) -> int:
        """Virtual tokens that an adapter puts before the prompt."""
        return 0 if self.edits is None else self.edits.num_virtual

    @property
    def prefill_len(self) -> int:
        """Tokens before the first generated one: the virtual ones and the original prompt."""
        return self.num_virtual + len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prefill_len

    @property
    def generated_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.prefill_len :]

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt's keys and values are in the slot."""
        return self.num_computed >= self.prefill_len

    def timings(self, now: float) -> Timings:
        """Seconds by stage, for a sequence that ends at ``now``."""
        admitted = self.admitted_at or now
        first = self.first_token_at or now
        return Timings(
            queue_s=admitted - self.submitted_at, prefill_s=first - admitted, decode_s=now - first
        )

"""One request while the engine runs it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from reft_core.batch import PromptEdits
from reft_core.engine.interface import OutputSink, Request, Timings, Token
from reft_core.engine.provenance import Provenance

Flow = tuple[str, tuple[str, ...]]
"""Whose request it is, and the digests of the adapters it uses."""


@dataclass(eq=False)
class Sequence:
    """A request's tokens, progress and place in the KV store."""

    request: Request
    sink: OutputSink
    edits: PromptEdits | None
    stop_ids: frozenset[int]
    """Tokens that end it: the request's own, and the model's unless it ignores them."""
    provenance: Provenance | None = None
    """Names of its blocks in the prefix cache; None keeps it out of the cache."""
    generator: random.Random | None = field(init=False, default=None)
    """Source of randomness when the request has a seed."""
    token_ids: list[int] = field(init=False)
    """A placeholder for each virtual token, the prompt, then generated tokens."""
    slot: int = -1
    """Row of the KV store; -1 while waiting. Owned by the scheduler."""
    num_computed: int = 0
    """Tokens whose keys and values are in the slot."""
    prefill_target: int = 0
    """Tokens to prefill before the next one can be sampled: those of the prompt, and after a
    preemption also those generated before it."""
    has_started: bool = False
    """Whether a chunk of it has its turn, or had it, since it has its slot."""
    num_taken: int = 0
    """Tokens in its slot that were not computed for it, after its virtual keys if it has any: the
    prefix cache held them, another sequence had them in its slot, or they were computed for
    another one in the same step."""
    prompt_logprobs: list[Token | None] = field(default_factory=list)
    """Of the prompt's first tokens, as far as they are known; see :attr:`is_scoring`."""
    num_cached: int = 0
    """Most tokens it took over, if it was computed more than once."""
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    first_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.token_ids = [0] * self.num_virtual + list(self.request.prompt)
        if self.request.params.seed is not None:
            self.generator = random.Random(str(self.request.params.seed))
        if self.request.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)  # nothing stands before the first token
        self.restart()

    def restart(self) -> None:
        """Begin again with an empty slot, as far as it has come."""
        adapter = self.edits.prefixed if self.edits else None
        has_kv_prefix = adapter is not None and adapter.has_kv_prefix
        self.num_computed = self.num_virtual if has_kv_prefix else 0
        self.prefill_target = len(self.token_ids)
        self.has_started = False
        self.num_taken = 0

    def take_over(self, num_tokens: int) -> None:
        """Note that this many tokens need not be computed for it."""
        self.num_taken += num_tokens
        self.num_cached = max(self.num_cached, self.num_taken)

    @property
    def flow(self) -> Flow:
        """What it shares its part of the engine with."""
        return self.request.tenant, self.adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Digests of the adapters it uses, in order."""
        return tuple(choice.digest for choice in self.request.adapters)

    @property
    def was_admitted(self) -> bool:
        """Whether it has, or had, a slot."""
        return self.admitted_at > 0

    @property
    def num_virtual(self) -> int:
        """Virtual tokens that an adapter puts before the prompt."""
        return 0 if self.edits is None else self.edits.num_virtual

    @property
    def prompt_end(self) -> int:
        """Tokens before the first generated one: the virtual ones and the original prompt."""
        return self.num_virtual + len(self.request.prompt)

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of its prompt's tokens are still to be computed."""
        return 0 < len(self.prompt_logprobs) < len(self.request.prompt)

    @property
    def first_read(self) -> int:
        """First position whose logits are wanted; what comes before may be taken from the
        prefix cache."""
        if self.is_scoring:
            return self.num_virtual + len(self.prompt_logprobs) - 1
        return len(self.token_ids) - 1

    @property
    def num_cached_prompt_tokens(self) -> int:
        """Tokens of the request's own prompt that were not computed for it."""
        adapter = self.edits.prefixed if self.edits else None
        first = 0 if adapter is None or adapter.has_kv_prefix else self.num_virtual
        return max(0, min(self.num_cached - first, len(self.request.prompt)))

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_end

    @property
    def generated_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.prompt_end :]

    @property
    def is_prefilled(self) -> bool:
        """Whether all that was known when it got its slot is in there."""
        return self.num_computed >= self.prefill_target

    def timings(self, now: float) -> Timings:
        """Seconds by stage, for a sequence that ends at ``now``."""
        admitted = self.admitted_at or now
        first = self.first_token_at or now
        return Timings(
            queue_s=admitted - self.submitted_at, prefill_s=first - admitted, decode_s=now - first
        )

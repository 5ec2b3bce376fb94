"""What becomes known of one HTTP request, for its log line and its trace.

Whoever learns something notes it in the record of the request that it works for; the middleware
that opened the record reads it once, at the end. Prompts and answers are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from reft_core.engine.interface import SamplingParams, Timings
from server.answering.named import UsedAdapter
from server.observability.adapter_usage import Key, keys_of


@dataclass
class ChoiceRecord:
    """One choice of a generation. Times are those of ``time.perf_counter``."""

    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    num_tokens: int = 0
    finish_reason: str | None = None
    timings: Timings | None = None
    """The engine's own; not known in time where a stop string, or the client, ended it."""

    @property
    def time_per_token_s(self) -> float | None:
        """Mean seconds between its tokens; None if there are fewer than two."""
        if self.first_token_at is None or self.last_token_at is None or self.num_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_tokens - 1)


@dataclass
class RequestRecord:
    """One HTTP request. What is not known keeps its default."""

    response_id: str | None = None
    model: str | None = None
    """The name that was asked for, once it is known to exist."""
    adapters: tuple[str, ...] = ()
    """What acted, as ``name@sha256:…``, in order."""
    digests: tuple[str, ...] = ()
    """The files' SHA-256, of the same."""
    adapter_keys: tuple[Key, ...] = ()
    """The tenants and names, of the same."""
    is_stream: bool = False
    num_choices: int = 1
    params: SamplingParams | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_edits: int = 0
    resolved: tuple[float, float] | None = None
    """When names and prompts were worked out: from, to."""
    held: tuple[float, float] | None = None
    """When its adapters were brought into the engine: from, to."""
    choices: list[ChoiceRecord] = field(default_factory=list)
    error: str | None = None
    """Class of what it failed with."""

    def note_adapters(self, versions: Iterable[UsedAdapter]) -> None:
        """These versions act, in this order, each named once."""
        each = {(version.name, version.digest): version for version in versions}.values()
        self.adapters = tuple(version.reference for version in each)
        self.digests = tuple(version.digest for version in each)
        self.adapter_keys = keys_of(each)

    def for_log(self) -> dict[str, object]:
        """What the log line of the request says beside route and status."""
        found: dict[str, object] = {}
        if self.model is not None:
            found |= {
                "model": self.model,
                "adapter": ",".join(self.adapters) or "base",
                "prompt_tokens": self.num_prompt_tokens,
                "cached_tokens": self.num_cached_tokens,
                "completion_tokens": self.num_completion_tokens,
                "edits": self.num_edits,
            }
        reasons = sorted({c.finish_reason for c in self.choices if c.finish_reason})
        if reasons:
            found["finish_reason"] = ",".join(reasons)
        if self.error is not None:
            found["error"] = self.error
        return found


_current: ContextVar[RequestRecord | None] = ContextVar("reft_request_record", default=None)


def open_record() -> RequestRecord:
    """A new record, which :func:`current_record` returns from now on in this context."""
    record = RequestRecord()
    _current.set(record)
    return record


def current_record() -> RequestRecord:
    """The record of the request that this code works for; outside of one, a record for nobody."""
    return _current.get() or RequestRecord()

"""One accepted request while vLLM runs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from reft_core.engine.interface import FinishReason, OutputSink, Request, Timings
from reft_core.errors import ReftError


@dataclass(eq=False)
class Running:
    """Belongs to the engine's loop, but for what is known at submission."""

    request: Request
    sink: OutputSink
    num_edits: int
    params: Any
    """vLLM's sampling parameters."""
    files: tuple[str, ...] = ()
    """Digests of the adapter files that it needs."""
    submitted_at: float = field(default_factory=time.monotonic)
    task: asyncio.Future[None] | None = None
    """What delivers its outputs; None before the engine has started."""
    ending: tuple[FinishReason, ReftError | None] | None = None
    """How it is to end, if not as vLLM ends it."""
    has_ended: bool = False
    """Whether its last output was delivered."""
    begun_at: float = 0.0
    """When its first output came."""
    _prefill_s: float = 0.0
    _clock: asyncio.TimerHandle | None = None

    def start_clock(self, expire: Callable[[Running], None]) -> None:
        """Have the running loop call ``expire`` when the request's deadline, if any, has passed."""
        if self.request.deadline_s is not None:
            left_s = self.submitted_at + self.request.deadline_s - time.monotonic()
            loop = asyncio.get_running_loop()
            self._clock = loop.call_later(max(0.0, left_s), expire, self)

    def stop_clock(self) -> None:
        """Forget the deadline."""
        if self._clock is not None:
            self._clock.cancel()

    def note(self, metrics: Any) -> None:
        """Take over what vLLM measured, a ``RequestStateStats``."""
        if metrics is not None and metrics.scheduled_ts:
            self._prefill_s = max(0.0, metrics.first_token_ts - metrics.scheduled_ts)

    def timings(self, now: float) -> Timings:
        """Seconds by stage, if the request ends ``now``."""
        if not self.begun_at:
            return Timings(now - self.submitted_at, 0.0, 0.0)
        before_s = self.begun_at - self.submitted_at
        prefill_s = min(self._prefill_s, before_s)
        return Timings(before_s - prefill_s, prefill_s, now - self.begun_at)

"""Whether to send requests here: the model must be ready, and the registry must answer."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

import structlog

from server.http.lifecycle import Lifecycle
from server.observability.metrics import Metrics
from server.registry import Registry

log = structlog.get_logger(__name__)

_KEPT_S = 1.0
"""How long one answer of the registry counts, however often somebody asks."""
_PATIENCE_S = 2.0
"""A registry that takes longer to answer does not count as there."""

State = Literal["ready", "draining", "not ready", "the registry does not answer"]


class Readiness:
    """Asks the registry when somebody wants to know. Belongs to the event loop."""

    def __init__(self, lifecycle: Lifecycle, registry: Registry, metrics: Metrics) -> None:
        self._lifecycle = lifecycle
        self._registry = registry
        self._metrics = metrics
        self._asked_at = -_KEPT_S
        self._asking: asyncio.Task[bool] | None = None
        self._answers = False

    async def check(self) -> State:
        """The state now, which the metrics say too from now on."""
        state: State = "ready"
        if self._lifecycle.draining:
            state = "draining"
        elif not self._lifecycle.ready:
            state = "not ready"
        elif not await self._registry_answers():
            state = "the registry does not answer"
        self._metrics.set_ready(state == "ready", self._answers)
        return state

    async def _registry_answers(self) -> bool:
        """Whether the registry answers, or did a moment ago."""
        if time.monotonic() - self._asked_at >= _KEPT_S:
            # One question at a time, also while a registry that hangs keeps its thread.
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            done, _ = await asyncio.wait({self._asking}, timeout=_PATIENCE_S)
            self._answers = bool(done) and self._asking.result()
            self._asked_at = time.monotonic()
        return self._answers

    async def _ask(self) -> bool:
        """Whether the catalog can be read."""
        try:
            await asyncio.to_thread(self._registry.all_current, limit=1)
        except Exception as error:
            log.warning("the registry does not answer", kind=type(error).__name__)
            return False
        return True

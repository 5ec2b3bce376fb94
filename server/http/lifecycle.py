"""From start to end of one server: ready, draining, stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

from reft_core.engine.interface import AdapterHost
from reft_core.errors import EngineUnavailable

log = structlog.get_logger(__name__)


class Lifecycle:
    """Starts the engine, says whether to send requests, and ends in good order."""

    def __init__(self, engine: AdapterHost, drain_timeout_s: float) -> None:
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._started = False
        self._refuses = False
        self._num_open = 0
        self._idle = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """False once the engine has died, which only a restart of the process repairs."""
        return self._engine.healthy or self._ending is not None

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._started and not self.draining and self._engine.healthy

    @property
    def draining(self) -> bool:
        """Whether the server has begun to end."""
        return self._refuses or self._ending is not None

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request as open, which the end of the server waits for.

        Raises :class:`EngineUnavailable` once the server has begun to end.
        """
        if self.draining:
            raise EngineUnavailable("the server is shutting down and takes no new requests")
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    def refuse(self) -> None:
        """Take no new requests from now on. May be called by a signal's handler."""
        self._refuses = True

    def start(self) -> None:
        """Start the engine."""
        self._engine.start()
        self._started = True

    async def drain(self) -> None:
        """Refuse new requests, let those accepted finish within the time limit, then stop.

        Requests still open after it end with an error of their own. May be called again;
        every caller waits for the same end.
        """
        self.refuse()
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        """See :meth:`drain`."""
        log.info("draining", timeout_s=self._drain_timeout_s, open_requests=self._num_open)
        give_up_at = time.monotonic() + self._drain_timeout_s
        if self._num_open:  # some have not come as far as the engine, which must still take them
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._drain_timeout_s)
        left_s = max(0.0, give_up_at - time.monotonic())
        finished = await asyncio.to_thread(self._engine.drain, left_s)
        if not finished:
            log.warning("requests were cut off by the drain timeout")
        await asyncio.to_thread(self._engine.stop)
        log.info("engine stopped")

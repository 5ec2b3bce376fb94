"""From start to end of one server: ready, draining, stopped."""

from __future__ import annotations

import asyncio

import structlog

from reft_core.engine.interface import AdapterHost

log = structlog.get_logger(__name__)


class Lifecycle:
    """Starts the engine, says whether to send requests, and ends in good order."""

    def __init__(self, engine: AdapterHost, drain_timeout_s: float) -> None:
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._started = False
        self._ending: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """False once the engine has died, which only a restart of the process repairs."""
        return self._engine.healthy or self._ending is not None

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._started and self._ending is None and self._engine.healthy

    @property
    def draining(self) -> bool:
        """Whether the server has begun to end."""
        return self._ending is not None

    def start(self) -> None:
        """Start the engine."""
        self._engine.start()
        self._started = True

    async def drain(self) -> None:
        """Refuse new requests, let those accepted finish within the time limit, then stop.

        Requests still open after it end with an error of their own. May be called again;
        every caller waits for the same end.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        """See :meth:`drain`."""
        log.info("draining", timeout_s=self._drain_timeout_s)
        finished = await asyncio.to_thread(self._engine.drain, self._drain_timeout_s)
        if not finished:
            log.warning("requests were cut off by the drain timeout")
        await asyncio.to_thread(self._engine.stop)
        log.info("engine stopped")

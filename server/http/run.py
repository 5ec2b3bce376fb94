"""The process that serves: uvicorn, with an end that keeps its promises."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Callable
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from server.http.connections import ConnectionLimits, protocol_within
from server.http.lifecycle import Lifecycle
from server.settings import Settings

log = structlog.get_logger(__name__)

_CLOSE_TIMEOUT_S = 5
"""Time for last bytes to leave, once every request has its answer."""
_BACKLOG = 2048
"""Connections that the system accepts before we do."""
_OTHER_FILES = 256
"""Files that are open beside connections, at most."""
_SAME_SIGNAL_S = 1.0
"""Signals this close together are one: a terminal or make may deliver it twice."""


class DrainingServer(uvicorn.Server):
    """Ends in order on SIGTERM or SIGINT.

    ``/readyz`` turns 503 while the port stays open, requests in flight finish within the
    drain timeout, then the server closes and the process exits with 0. A second signal,
    sent a second later or more, ends it at once, with 128 and the signal's number.
    """

    def __init__(self, app: FastAPI, settings: Settings, on_ready: Callable[[str], None]) -> None:
        allow_open_files(settings.max_connections + _OTHER_FILES)
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                lifespan="on",
                ws="none",
                log_config=None,  # server.logs has set it up
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
                http=protocol_within(ConnectionLimits.of(settings)),
                timeout_keep_alive=settings.keep_alive_timeout_s,
                backlog=_BACKLOG,
            )
        )
        self._app = app
        self._on_ready = on_ready
        self._end_requested_at: float | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind the port, then say where."""
        await super().startup(sockets)
        if self.started:
            self._on_ready(self.url)

    @property
    def url(self) -> str:
        """Address the server listens on, with the port it really got."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; on a second signal, end now."""
        # Not handed to uvicorn, which would raise the signal again after its shutdown and
        # so turn an orderly end into death by signal.
        now = time.monotonic()
        if self._end_requested_at is None:
            self._end_requested_at = now
            services = getattr(self._app.state, "services", None)
            if services is not None:  # else it has not started, and has nothing to refuse
                services.lifecycle.refuse()
        elif now - self._end_requested_at > _SAME_SIGNAL_S:
            # Nothing of Python's own end, which may wait for a thread, or abort under a step of
            # the engine's.
            os._exit(128 + sig)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: move the end along, if it has begun."""
        if self._end_requested_at is not None and self._draining is None:
            lifecycle: Lifecycle = self._app.state.services.lifecycle
            self._draining = asyncio.create_task(lifecycle.drain())
        if self._draining is not None and self._draining.done():
            self.should_exit = True
        return await super().on_tick(counter)


def allow_open_files(wanted: int) -> None:
    """Let this process open so many files, each connection being one, or warn that it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return
    allowed = wanted if hard == unlimited else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("few files may be open (ulimit -n)", allowed=allowed, wanted=wanted)

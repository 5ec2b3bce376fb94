"""The way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from reft_core.engine.interface import Output

log = structlog.get_logger(__name__)

Receive = Callable[[Output], None]
"""Takes an output, on the event loop. Must not raise."""


class Outbox:
    """Carries outputs to one event loop, in order.

    What an engine step makes for many requests arrives in one call: waking a loop costs more
    than all that is then done for a token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._on_way: deque[tuple[Receive, Output]] = deque()
        self._is_called = False

    def put(self, receive: Receive, output: Output) -> None:
        """Have ``receive`` called with an output. From any thread.

        Raises :class:`RuntimeError` once the loop is closed: nobody is left to tell.
        """
        # In this order: who finds the call on its way has put the output where it will look.
        self._on_way.append((receive, output))
        if not self._is_called:
            self._is_called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._is_called = False
                raise

    def _deliver(self) -> None:
        """Hand over all there is."""
        self._is_called = False
        for _ in range(len(self._on_way)):
            receive, output = self._on_way.popleft()
            try:
                receive(output)
            except Exception:  # the others', which would wait here for whatever comes next
                log.exception("an output could not be handed over", request=output.request_id)

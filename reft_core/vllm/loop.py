"""An asyncio loop on a thread of its own, for code that is called from other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from reft_core.errors import EngineUnavailable

T = TypeVar("T")


class LoopThread:
    """Runs until :meth:`close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._spawned: set[Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """What ``work`` returns or raises; the calling thread, which is another one, waits.

        Raises :class:`EngineUnavailable` if the loop ends before.
        """
        future = self.spawn(work)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise
        except CancelledError:
            raise EngineUnavailable("the engine was stopped") from None

    def spawn(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the loop run ``work``, after what it was asked before. Cancelled once closed."""
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:
            work.close()
            future = Future()
            future.cancel()
            return future
        self._spawned.add(future)  # the loop itself keeps no task alive
        future.add_done_callback(self._spawned.discard)
        return future

    def soon(self, function: Callable[..., object], *args: Any) -> None:
        """Have the loop call ``function``, after what it was asked before. No-op once closed."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    def close(self) -> None:
        """End the loop and its thread. What still runs on it is cancelled."""
        self.soon(self.loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.close()

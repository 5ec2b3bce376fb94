"""What every engine is to its callers: the requests that are open, the adapters, one thread."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from reft_core.adapter import Adapter
from reft_core.engine.choices import loaded_adapter
from reft_core.engine.config import EngineConfig
from reft_core.errors import EngineOverloaded, EngineUnavailable, InvalidRequest, ReftError
from reft_core.spec import AdapterSpec

log = logging.getLogger(__name__)

R = TypeVar("R")
"""An accepted request."""


class Host(ABC, Generic[R]):
    """The part of an :class:`interface.AdapterHost` that knows nothing of models.

    ``_changed`` is the one lock between callers and the engine's thread. It guards what both
    touch, such as the open requests and the adapters, and is notified when that changes.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._changed = threading.Condition()
        self._open: dict[str, R] = {}
        self._waiting_tokens: dict[str, int] = {}
        """Of the open requests that have not begun."""
        self._num_waiting_tokens = 0
        self._waiting_before: int | None = None
        """How many those were before what is being submitted together."""
        self._adapters: dict[str, Adapter] = {}
        self._draining = False
        self._stopping = False
        self._died = False

    @property
    def healthy(self) -> bool:
        """False once the engine's thread has stopped or died."""
        return not (self._died or self._stopping)

    def has_adapter(self, digest: str) -> bool:
        """Whether requests may name this digest now."""
        return digest in self._adapters

    def adapter_spec(self, digest: str) -> AdapterSpec:
        """The spec of a loaded adapter. Raises :class:`InvalidRequest` if it is not loaded."""
        return loaded_adapter(self._adapters, digest).spec

    @contextmanager
    def together(self) -> Iterator[None]:
        """See :meth:`interface.Engine.together`."""
        with self._changed:  # re-entrant; a step takes arrivals in under the same lock
            outer, self._waiting_before = self._waiting_before, self._num_waiting_tokens
            try:
                yield
            finally:
                self._waiting_before = outer

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those accepted; True if all ended in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def _admit(self, request_id: str, request: R, num_tokens: int) -> None:
        """Count a request, whose prompt has so many tokens, among the open ones and those that
        wait; the caller holds the lock.

        Raises :class:`EngineUnavailable`, :class:`EngineOverloaded`, or :class:`InvalidRequest` if
        its id is in use.
        """
        if self._draining or not self.healthy:
            raise EngineUnavailable("the engine is shutting down and takes no new requests")
        if request_id in self._open:
            raise InvalidRequest.because("request_id", request_id, "an unused id")
        if len(self._open) >= self._config.max_open:
            raise EngineOverloaded(
                f"the queue is full: {len(self._open)} requests are open, at most "
                f"{self._config.max_open}"
            )
        before = self._waiting_before
        waiting = self._num_waiting_tokens if before is None else before
        if waiting >= self._config.max_waiting_tokens:
            raise EngineOverloaded(
                f"the queue is full: prompts of {waiting} tokens wait, at most "
                f"{self._config.max_waiting_tokens}"
            )
        self._open[request_id] = request
        self._waiting_tokens[request_id] = num_tokens
        self._num_waiting_tokens += num_tokens
        self._changed.notify_all()

    def _leave_queue(self, request_id: str) -> None:
        """A request has begun, or ended; the caller holds the lock."""
        self._num_waiting_tokens -= self._waiting_tokens.pop(request_id, 0)

    @abstractmethod
    def _abandon(self, request: R, error: ReftError) -> None:
        """End an open request with ``error``; the engine's thread is gone or going."""

    def _abandon_open(self, error: ReftError) -> None:
        """End every open request with ``error``."""
        with self._changed:
            requests = list(self._open.values())
        for request in requests:
            self._abandon(request, error)


class ThreadedHost(Host[R]):
    """A host whose thread runs :meth:`_work` from :meth:`start` to :meth:`stop`."""

    def __init__(self, config: EngineConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        super().__init__(config)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the engine's thread; requests submitted before wait for it."""
        assert self._thread is None, "an engine starts once"
        self._thread = threading.Thread(target=self._run, name="reft-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests still open get an :class:`EngineUnavailable`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._abandon_open(EngineUnavailable("the engine was stopped"))

    @abstractmethod
    def _work(self) -> None:
        """Run requests, on the engine's thread, until the engine is to stop."""

    def _run(self) -> None:
        """Work, and never die silently."""
        try:
            self._work()
        except BaseException as error:
            log.exception("the engine's thread died")
            with self._changed:  # who is being admitted now is among the open ones afterwards
                self._died = True
            self._abandon_open(EngineUnavailable(f"the engine died: {error}"))
            raise

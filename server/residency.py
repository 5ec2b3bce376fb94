"""Which adapters are in the engine now: loaded on first use, kept while used, then LRU.

Runs on the event loop and has no locks: between two awaits nothing else changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from reft_core.adapter import decode_adapter
from reft_core.engine.interface import Engine
from reft_core.errors import EngineOverloaded
from reft_core.threads import run_in_own_thread

log = structlog.get_logger(__name__)

ReadBlob = Callable[[str], bytes]
"""The verified bytes of an adapter file, by digest. Blocks."""


@dataclass
class _Resident:
    """An adapter in the engine, or on its way there."""

    num_bytes: int
    loading: asyncio.Task[None]
    num_users: int = 0
    forgotten: bool = False
    """Deleted from the registry: leaves with its last user."""


class Residency:
    """Reference-counted adapters of one engine, within a budget of bytes."""

    def __init__(
        self,
        engine: Engine,
        read: ReadBlob,
        budget_bytes: int,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._read = read
        self._budget_bytes = budget_bytes
        self._on_load = on_load
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters that are resident or loading."""
        return sum(resident.num_bytes for resident in self._residents.values())

    def num_users(self, digest: str) -> int | None:
        """Requests using an adapter now; None if it is not resident."""
        resident = self._residents.get(digest)
        return None if resident is None else resident.num_users

    async def acquire(self, digest: str, num_bytes: int) -> None:
        """Have the engine hold ``digest`` until :meth:`release` is called as often.

        However many ask at once, the file is read once. Raises what reading and loading
        raise, and :class:`EngineOverloaded` when adapters in use fill the budget; then
        nothing has been acquired.
        """
        resident = self._residents.get(digest)
        if resident is None:
            self._make_room(num_bytes)
            loading = asyncio.create_task(self._load(digest))
            # Read the outcome even if everybody who waited for it has gone.
            loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            resident = self._residents[digest] = _Resident(num_bytes, loading)
        resident.num_users += 1
        resident.forgotten = False
        self._residents.move_to_end(digest)
        try:
            await asyncio.shield(resident.loading)
        except BaseException:
            resident.num_users -= 1
            raise

    def release(self, digest: str) -> None:
        """Give back what one :meth:`acquire` took. The adapter stays until room is needed."""
        resident = self._residents[digest]
        assert resident.num_users > 0, "released more often than acquired"
        resident.num_users -= 1
        if resident.forgotten and not resident.num_users:
            self._evict(digest)

    def forget(self, digest: str) -> None:
        """Drop a deleted adapter: now, or when the requests that use it have ended."""
        resident = self._residents.get(digest)
        if resident is None:
            return
        resident.forgotten = True
        if not resident.num_users and resident.loading.done():
            self._evict(digest)

    async def _load(self, digest: str) -> None:
        """Read and load one adapter off the event loop; on failure it is not resident."""
        try:
            await asyncio.to_thread(self._load_blocking, digest)
        except BaseException:
            self._residents.pop(digest, None)
            raise
        self._on_load()
        resident = self._residents[digest]
        if resident.forgotten and not resident.num_users:
            self._evict(digest)

    def _load_blocking(self, digest: str) -> None:
        """The slow part of a load; runs in a thread."""
        data = self._read(digest)
        run_in_own_thread(lambda: self._engine.load_adapter(decode_adapter(data)))

    def _make_room(self, num_bytes: int) -> None:
        """Evict unused adapters, least recently used first, until ``num_bytes`` fit."""
        excess = self.num_bytes + num_bytes - self._budget_bytes
        unused = [
            (digest, resident.num_bytes)
            for digest, resident in self._residents.items()
            if not resident.num_users and resident.loading.done()
        ]
        if excess > sum(size for _, size in unused):
            raise EngineOverloaded(
                f"adapter memory is full: adapters in use leave no room for {num_bytes} bytes "
                f"of {self._budget_bytes}; try again later"
            )
        for digest, size in unused:
            if excess <= 0:
                return
            self._evict(digest)
            excess -= size

    def _evict(self, digest: str) -> None:
        """Take an unused adapter out of the engine."""
        del self._residents[digest]
        self._engine.unload_adapter(digest)
        log.debug("adapter unloaded", digest=digest)

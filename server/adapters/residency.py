"""Which adapters are in the engine now: loaded on first use, kept while used, then LRU.

Runs on the event loop and has no locks: between two awaits nothing else changes. However many
adapters are resident, nothing here takes longer.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from reft_core.adapter import Adapter, decode_adapter
from reft_core.engine.interface import AdapterHost
from reft_core.errors import EngineOverloaded
from reft_core.threads import start_in_own_thread

log = structlog.get_logger(__name__)

ReadBlob = Callable[[str], bytes]
"""The verified bytes of an adapter file, by digest. Blocks."""

_MAX_LOADS = 4
"""Files read and checked at once; each has a thread, which takes turns with the engine's."""


@dataclass(eq=False)
class _Resident:
    """An adapter in the engine, or on its way there."""

    digest: str
    num_bytes: int
    num_users: int = 0
    has_room: bool = False
    """Whether its bytes count against the budget. Until then it waits in the queue."""
    is_loaded: bool = False
    swapped: bool = False
    """Another one had to leave for it."""
    forgotten: bool = False
    """Not in the registry, or no longer: leaves with its last user."""
    brought: Adapter | None = None
    """What is to be loaded, if it is not to be read from the registry."""
    turn: asyncio.Future[None] | None = None
    """Done once it has room, if it had to wait for it."""
    loading: asyncio.Task[None] = field(init=False)


class Residency:
    """Reference-counted adapters of one engine, within a budget of bytes.

    When those in use fill the budget, a cold one waits for room for at most ``wait_s``; whoever
    came first is first to get it. Requests for resident adapters never wait.
    """

    def __init__(
        self,
        engine: AdapterHost,
        read: ReadBlob,
        budget_bytes: int,
        on_load: Callable[[float, bool], None] = lambda seconds, swapped: None,
        wait_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._read = read
        self._budget_bytes = budget_bytes
        self._on_load = on_load
        self._wait_s = wait_s
        self._residents: dict[str, _Resident] = {}
        self._unused: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._unused_bytes = 0
        self._queue: deque[_Resident] = deque()
        self._pinned: dict[str, str] = {}
        self._load_slots = asyncio.Semaphore(_MAX_LOADS)
        self.num_bytes = 0
        """Bytes of the adapters that are resident or loading."""
        self.num_references = 0
        """What all :meth:`acquire` took and no :meth:`release` gave back, pins included."""
        self.num_evictions = 0

    @property
    def budget_bytes(self) -> int:
        """Most bytes that may be resident or loading."""
        return self._budget_bytes

    @property
    def num_pinned(self) -> int:
        """Adapters that stay whatever happens."""
        return len(self._pinned)

    @property
    def num_waiting(self) -> int:
        """Adapters that wait for room."""
        return len(self._queue)

    def num_users(self, digest: str) -> int | None:
        """Requests using an adapter now; None if it is not resident."""
        resident = self._residents.get(digest)
        if resident is None:
            return None
        return resident.num_users - sum(pinned == digest for pinned in self._pinned.values())

    async def acquire(self, digest: str, num_bytes: int, brought: Adapter | None = None) -> None:
        """Have the engine hold ``digest`` until :meth:`release` is called as often.

        ``brought`` is the adapter if the request brought it along: it leaves with its last user,
        unless somebody asked for it by name meanwhile. However many ask at once, it is read once.
        Raises what reading and loading raise, and :class:`EngineOverloaded` when adapters in use
        fill the budget for longer than the limit; then nothing has been acquired.
        """
        resident = self._residents.get(digest)
        if resident is None:
            resident = _Resident(digest, num_bytes, forgotten=brought is not None, brought=brought)
            self._residents[digest] = resident
            resident.loading = asyncio.create_task(self._load(resident))
            # Read the outcome even if everybody who waited for it has gone.
            resident.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._use(resident)
        if brought is None:
            resident.forgotten = False
        try:
            await asyncio.shield(resident.loading)
        except BaseException:
            self._leave(resident)
            if not resident.num_users and not resident.has_room:
                # Nobody waits for its room any more. Dropped here and not by the task's end, so
                # that whoever asks before that does not wait for a cancelled task.
                self._drop(resident)
                resident.loading.cancel()
            raise

    def release(self, digest: str) -> None:
        """Give back what one :meth:`acquire` took. The adapter stays until room is needed."""
        self._leave(self._residents[digest])

    def forget(self, digest: str) -> None:
        """Drop a deleted adapter: now, or when the requests that use it have ended."""
        resident = self._residents.get(digest)
        if resident is None:
            return
        resident.forgotten = True
        for name in [name for name, pinned in self._pinned.items() if pinned == digest]:
            self.unpin(name)
        if digest in self._unused:
            self._evict(resident)
            self._admit()

    async def pin(self, name: str, digest: str, num_bytes: int) -> None:
        """Load ``digest`` and keep it for ``name``, in place of what was kept for it before.

        Raises what :meth:`acquire` raises; then what was kept before is still kept.
        """
        if self._pinned.get(name) == digest:
            return
        await self.acquire(digest, num_bytes)
        self.unpin(name)
        self._pinned[name] = digest

    def unpin(self, name: str) -> None:
        """Let go of what is kept for ``name``; no-op if that is nothing."""
        if name in self._pinned:
            self.release(self._pinned.pop(name))

    async def _load(self, resident: _Resident) -> None:
        """Find room for an adapter, read and load it off the event loop.

        On failure it is not resident.
        """
        began_at = time.perf_counter()
        try:
            await self._find_room(resident)
            async with self._load_slots:
                loaded = start_in_own_thread(lambda: self._load_blocking(resident))
                await asyncio.wrap_future(loaded)
        except BaseException:
            self._drop(resident)
            self._admit()
            raise
        self._on_load(time.perf_counter() - began_at, resident.swapped)
        resident.is_loaded = True
        if not resident.num_users:
            self._rest(resident)

    def _load_blocking(self, resident: _Resident) -> None:
        """The slow part of a load; runs in a thread."""
        adapter = resident.brought
        if adapter is None:
            digest = resident.digest
            adapter = decode_adapter(self._read(digest), digest=digest)
        self._engine.load_adapter(adapter)
        resident.brought = None  # the engine has a copy of its own

    async def _find_room(self, resident: _Resident) -> None:
        """Count an adapter against the budget once it fits, or raise :class:`EngineOverloaded`."""
        if resident.num_bytes > self._budget_bytes:
            raise EngineOverloaded(
                f"an adapter of {resident.num_bytes} bytes does not fit into the adapter memory "
                f"of {self._budget_bytes}"
            )
        if resident.brought is not None:
            self._check_brought(resident.num_bytes)
        self._queue.append(resident)
        resident.turn = asyncio.get_running_loop().create_future()
        self._admit()
        try:
            async with asyncio.timeout(self._wait_s):
                await resident.turn
        except TimeoutError:
            raise EngineOverloaded(
                f"adapter memory is full: adapters in use leave no room for {resident.num_bytes} "
                f"bytes of {self._budget_bytes}; try again later"
            ) from None

    def _check_brought(self, num_bytes: int) -> None:
        """Refuse an adapter that is in memory while it waits, as no file has it, beside too many
        of its kind."""
        waiting = sum(other.num_bytes for other in self._queue if other.brought is not None)
        if waiting + num_bytes > self._budget_bytes:
            raise EngineOverloaded(
                f"adapter memory is full, and {waiting} bytes of adapters that requests brought "
                "wait for room; try again later"
            )

    def _admit(self) -> None:
        """Let those who wait for room in, in their order, as far as there is any."""
        while self._queue:
            resident = self._queue[0]
            excess = self.num_bytes + resident.num_bytes - self._budget_bytes
            if excess > self._unused_bytes:
                return
            while self.num_bytes + resident.num_bytes > self._budget_bytes:
                self._evict(next(iter(self._unused.values())))
                resident.swapped = True
            self._queue.popleft()
            self.num_bytes += resident.num_bytes
            resident.has_room = True
            assert resident.turn is not None
            if not resident.turn.done():
                resident.turn.set_result(None)

    def _use(self, resident: _Resident) -> None:
        """Count one more user."""
        resident.num_users += 1
        self.num_references += 1
        if self._unused.pop(resident.digest, None) is not None:
            self._unused_bytes -= resident.num_bytes

    def _leave(self, resident: _Resident) -> None:
        """Count one user less."""
        assert resident.num_users > 0, "released more often than acquired"
        resident.num_users -= 1
        self.num_references -= 1
        if not resident.num_users and resident.is_loaded:
            self._rest(resident)

    def _rest(self, resident: _Resident) -> None:
        """Keep a loaded adapter that nobody uses until room is needed, if it is wanted at all."""
        self._unused[resident.digest] = resident
        self._unused_bytes += resident.num_bytes
        if resident.forgotten:
            self._evict(resident)
        self._admit()

    def _evict(self, resident: _Resident) -> None:
        """Take an unused adapter out of the engine."""
        del self._unused[resident.digest]
        self._unused_bytes -= resident.num_bytes
        self._engine.unload_adapter(resident.digest)
        self._drop(resident)
        self.num_evictions += 1
        log.debug("adapter unloaded", digest=resident.digest)

    def _drop(self, resident: _Resident) -> None:
        """Forget that an adapter was resident, or wanted to be; its room is free again."""
        if self._residents.get(resident.digest) is resident:
            del self._residents[resident.digest]
        if resident.has_room:
            resident.has_room = False
            self.num_bytes -= resident.num_bytes
        elif resident in self._queue:
            self._queue.remove(resident)

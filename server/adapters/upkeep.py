"""What a server does beside answering: it follows what others changed, and tidies up."""

from __future__ import annotations

import asyncio

import structlog

from reft_core.errors import ReftError
from server.adapters.pins import Pins
from server.adapters.residency import Residency
from server.registry import Registry

log = structlog.get_logger(__name__)


class Upkeep:
    """Runs every ``every_s``, on every server that shares a catalog, until it is stopped.

    Names need none of it, as each request looks them up in the catalog.
    """

    def __init__(
        self, registry: Registry, residency: Residency, pins: Pins, every_s: float, grace_s: float
    ) -> None:
        self._registry = registry
        self._residency = residency
        self._pins = pins
        self._every_s = every_s
        self._grace_s = grace_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End, at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def turn(self) -> None:
        """Do everything once.

        Deleted adapters leave memory with their last request. Their files go after the grace
        period, in which requests that other servers had accepted may still read them, and once
        no request uses them here.
        """
        doomed = await asyncio.to_thread(self._registry.trash)
        for digest in doomed:
            self._residency.forget(digest)
        used = {digest for digest in doomed if self._residency.num_users(digest)}
        await self._pins.refresh()
        removed = await asyncio.to_thread(self._registry.collect, self._grace_s, used)
        if removed:
            log.info("files of deleted adapters removed", num_files=len(removed))

    async def _run(self) -> None:
        """Take turns. A failure is of one turn, and logged when it is not that of the last one."""
        failure = ""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.turn()
                failure = ""
            except ReftError as error:
                if str(error) != failure:
                    log.warning("upkeep of the registry failed", error=str(error))
                failure = str(error)
            except Exception:
                log.exception("upkeep of the registry failed")

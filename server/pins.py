"""Adapters that the operator wants in memory whatever else is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from reft_core.errors import AdapterNotFound, ReftError
from server.registry import Registry
from server.residency import Residency

log = structlog.get_logger(__name__)


class Pins:
    """Keeps the current version of some names resident."""

    def __init__(self, names: Iterable[str], registry: Registry, residency: Residency) -> None:
        self._names = frozenset(names)
        self._registry = registry
        self._residency = residency
        self._changing = asyncio.Lock()

    async def load(self) -> None:
        """Load what there is of the names; the others follow when they are uploaded.

        Raises what loading raises: a file that is damaged, or too little memory for all.
        """
        for name in sorted(self._names):
            try:
                await asyncio.to_thread(self._registry.current, name)
            except AdapterNotFound:
                log.warning("a pinned adapter is not registered", adapter=name)
                continue
            await self._pin(name)

    async def follow(self, name: str) -> None:
        """Keep what ``name`` means now if it is pinned. A failure to is only logged."""
        if name not in self._names:
            return
        try:
            await self._pin(name)
        except ReftError as error:
            log.warning("an adapter could not be pinned", adapter=name, error=str(error))

    async def drop(self, name: str) -> None:
        """Let go of a name that was deleted."""
        if name in self._names:
            async with self._changing:
                self._residency.unpin(name)

    async def _pin(self, name: str) -> None:
        """Keep the current version. In turn, so that of two uploads the later one stays, and that
        a name deleted while its adapter loads is let go of afterwards.
        """
        async with self._changing:
            version = await asyncio.to_thread(self._registry.current, name)
            await self._residency.pin(name, version.digest, version.resident_bytes)

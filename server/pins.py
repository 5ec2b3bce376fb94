"""Adapters that the operator wants in memory whatever else is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from reft_core.errors import AdapterNotFound, ReftError
from server.registry import Registry, Version
from server.residency import Residency

log = structlog.get_logger(__name__)


class Pins:
    """Keeps the current version of some names resident."""

    def __init__(self, names: Iterable[str], registry: Registry, residency: Residency) -> None:
        self._names = frozenset(names)
        self._registry = registry
        self._residency = residency

    async def load(self) -> None:
        """Load what there is of the names; the others follow when they are uploaded.

        Raises what loading raises: a file that is damaged, or too little memory for all.
        """
        for name in sorted(self._names):
            try:
                version = await asyncio.to_thread(self._registry.current, name)
            except AdapterNotFound:
                log.warning("a pinned adapter is not registered", adapter=name)
                continue
            await self._pin(version)

    async def follow(self, version: Version) -> None:
        """Keep ``version`` from now on if its name is pinned. A failure to is only logged."""
        if version.name not in self._names:
            return
        try:
            await self._pin(version)
        except ReftError as error:
            log.warning("an adapter could not be pinned", adapter=version.name, error=str(error))

    def drop(self, name: str) -> None:
        """Let go of a name that was deleted."""
        self._residency.unpin(name)

    async def _pin(self, version: Version) -> None:
        await self._residency.pin(version.name, version.digest, version.resident_bytes)

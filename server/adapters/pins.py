"""Adapters that the operator wants in memory whatever else is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from reft_core.errors import ReftError
from server.adapters.residency import Residency
from server.registry import SHARED, Registry, Version

log = structlog.get_logger(__name__)


class Pins:
    """Keeps the current version of some names resident: of the settings', and of those pinned
    over HTTP, on whichever server that was.
    """

    def __init__(self, names: Iterable[str], registry: Registry, residency: Residency) -> None:
        self._names = frozenset(names)
        self._registry = registry
        self._residency = residency
        self._kept: set[str] = set()
        self._failed: dict[str, str] = {}
        self._changing = asyncio.Lock()

    async def load(self) -> None:
        """Load what there is of the names; the others follow when they are uploaded.

        Raises what loading raises: a file that is damaged, or too little memory for all. Only for
        the settings' names: what was pinned over HTTP must not keep a server from starting.
        """
        versions = await asyncio.to_thread(self._registry.to_keep, self._names)
        for version in versions:
            if version.tenant == SHARED and version.name in self._names:
                await self._pin(version)
        for name in sorted(self._names - self._kept):
            log.warning("a pinned adapter is not registered", adapter=name)
        await self.refresh()

    async def refresh(self) -> None:
        """Keep what the names mean now, and nothing else. A failure to is only logged, once.

        In turn, so that of two uploads the later one stays, and that a name deleted while its
        adapter loads is let go of afterwards.
        """
        async with self._changing:
            versions = await asyncio.to_thread(self._registry.to_keep, self._names)
            for key in self._kept - set(map(_key, versions)):
                self._residency.unpin(key)
                self._kept.remove(key)
            for version in versions:
                await self._try_to_pin(version)

    async def _try_to_pin(self, version: Version) -> None:
        """Keep one version for its name, or log why not, once for each version."""
        key = _key(version)
        try:
            await self._pin(version)
        except ReftError as error:
            if self._failed.get(key) != version.digest:
                self._failed[key] = version.digest
                log.warning("an adapter could not be pinned", adapter=key, error=str(error))

    async def _pin(self, version: Version) -> None:
        """Keep one version for its name."""
        await self._residency.pin(_key(version), version.digest, version.resident_bytes)
        self._kept.add(_key(version))
        self._failed.pop(_key(version), None)


def _key(version: Version) -> str:
    """What a pin is known by."""
    return version.name if version.tenant == SHARED else f"{version.tenant}/{version.name}"

"""The adapters that one request keeps in the engine, from before it is submitted until it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AbstractContextManager

from reft_core.errors import InvalidRequest
from server.adapters.residency import Residency
from server.answering.inline import InlineAdapter
from server.answering.named import UsedAdapter


class Held:
    """Adapters held for one request, each once. Belongs to the event loop."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._digests: list[str] = []

    async def take(
        self, wanted: Iterable[tuple[UsedAdapter, AbstractContextManager[None]]]
    ) -> None:
        """Have every version resident, the cold ones read side by side.

        Raises :class:`InvalidRequest` if they never fit together, and what acquiring raises, that
        within the version's context. What was taken by then is still to be released.
        """
        first: dict[str, tuple[UsedAdapter, AbstractContextManager[None]]] = {}
        for version, about in wanted:
            first.setdefault(version.digest, (version, about))
        self._check_room([version for version, _ in first.values()])
        try:
            async with asyncio.TaskGroup() as group:
                for version, about in first.values():
                    group.create_task(self._take(version, about))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def release(self) -> None:
        """Give everything back. May be called again."""
        while self._digests:
            self._residency.release(self._digests.pop())

    async def _take(self, version: UsedAdapter, about: AbstractContextManager[None]) -> None:
        """Have one version resident."""
        with about:
            brought = version.adapter if isinstance(version, InlineAdapter) else None
            await self._residency.acquire(version.digest, version.resident_bytes, brought)
        self._digests.append(version.digest)

    def _check_room(self, versions: list[UsedAdapter]) -> None:
        """Refuse adapters that never fit together, for which no waiting would make room."""
        total = sum(version.resident_bytes for version in versions)
        budget = self._residency.budget_bytes
        if len(versions) > 1 and total > budget:
            raise InvalidRequest.because(
                "reft",
                f"{len(versions)} adapters of {total} bytes",
                f"at most {budget} bytes together, the memory for adapters",
            )

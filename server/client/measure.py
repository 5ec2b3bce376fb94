"""Requests sent at a fixed concurrency, and what was seen of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from reft_core.errors import ReftError
from server.client.connection import event, in_words, refusal


@dataclass
class Seen:
    """One request as its client saw it. Times are seconds on one monotonic clock."""

    model: str
    began_at: float
    ended_at: float = 0.0
    text_at: list[float] = field(default_factory=list)
    """When each event with text came."""
    usage: dict[str, Any] | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first text."""
        return self.text_at[0] - self.began_at if self.text_at else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between an event with text and the next."""
        return [b - a for a, b in zip(self.text_at, self.text_at[1:], strict=False)]

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer: as the server counts them, else an event for a token."""
        return len(self.text_at) if self.usage is None else int(self.usage["completion_tokens"])

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 where the server does not say."""
        return 0 if self.usage is None else int(self.usage.get("prompt_tokens", 0))


@dataclass
class Run:
    """All requests of a run, in the order they ended."""

    seen: list[Seen] = field(default_factory=list)
    took_s: float = 0.0
    was_stopped: bool = False


def measure(
    connection: Mapping[str, Any],
    path: str,
    bodies: Iterable[Mapping[str, Any]],
    concurrency: int,
    on_end: Callable[[Seen], None],
) -> Run:
    """Send every body, ``concurrency`` at a time, each as soon as another has ended.

    ``connection`` is what the HTTP client is made with. A request that fails is counted and the
    rest go on. Ctrl-C ends the run with what has been seen.
    """
    run = Run()
    began_at = time.perf_counter()

    def ended(seen: Seen) -> None:
        run.seen.append(seen)
        on_end(seen)

    try:
        asyncio.run(_send_all(connection, path, bodies, concurrency, ended))
    except KeyboardInterrupt:
        run.was_stopped = True
    run.took_s = time.perf_counter() - began_at
    return run


async def _send_all(
    connection: Mapping[str, Any],
    path: str,
    bodies: Iterable[Mapping[str, Any]],
    concurrency: int,
    ended: Callable[[Seen], None],
) -> None:
    # A connection for each that is open at once, and none thrown away between two.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    waiting = iter(bodies)

    async def worker(http: httpx.AsyncClient) -> None:
        for body in waiting:  # shared: each takes the next
            ended(await send(http, path, body))

    async with (
        httpx.AsyncClient(**connection, limits=limits) as http,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(concurrency):
            group.create_task(worker(http))


async def send(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Seen:
    """One request, streamed to its end; an error is part of what was seen."""
    seen = Seen(str(body["model"]), time.perf_counter())
    try:
        with in_words(str(http.base_url)):
            async with http.stream("POST", path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise refusal(response)
                async for line in response.aiter_lines():
                    _take(seen, event(line))
        if not seen.text_at and not (seen.usage or {}).get("completion_tokens"):
            seen.error = "the stream ended without a token"
    except ReftError as error:
        seen.error = error.message
    seen.ended_at = time.perf_counter()
    return seen


def _take(seen: Seen, chunk: Mapping[str, Any] | None) -> None:
    if chunk is None:
        return
    if chunk.get("usage"):
        seen.usage = dict(chunk["usage"])
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            seen.text_at.append(time.perf_counter())
            return

"""Request bodies within a cap: counted while they arrive, whatever their headers claim."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import HTTPException, Request
from starlette.types import Message, Receive

JSON = "application/json"
_PART_BYTES = 1024 * 1024
_LINGER_S = 2.0
_LINGER_BYTES = 256 * 1024 * 1024


def check_declared_length(request: Request, max_bytes: int) -> None:
    """Raise 413 if the request says itself that its body is over the cap."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large(int(declared), max_bytes)


def capped(receive: Receive, max_bytes: int, timeout_s: float) -> Receive:
    """``receive``, raising 413 as soon as more than ``max_bytes`` of body have come, and 408 if
    not all of it has within ``timeout_s`` from now.
    """
    num_bytes, is_read = 0, False
    due = asyncio.get_running_loop().time() + timeout_s

    async def counting() -> Message:
        nonlocal num_bytes, is_read
        try:
            async with asyncio.timeout_at(None if is_read else due):
                message = await receive()
        except TimeoutError:
            raise too_slow(num_bytes, timeout_s) from None
        is_read = is_read or not message.get("more_body")
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise too_large(num_bytes, max_bytes, at_least=True)
        return message

    return counting


async def stream_capped(request: Request, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    """The body in parts of about a MiB. Raises 413 without reading on once it is over the cap, and
    408 if it takes longer to come.
    """
    check_declared_length(request, max_bytes)
    part = bytearray()
    receive = capped(request.receive, max_bytes, timeout_s)
    async for chunk in Request(request.scope, receive).stream():
        part += chunk
        if len(part) >= _PART_BYTES:
            yield bytes(part)
            part.clear()
    if part:
        yield bytes(part)


async def discard(receive: Receive) -> None:
    """Read what a client still sends of a body that was refused, within limits.

    To be called between its answer and the end of the connection: most clients send all they
    have before they read, and closing a connection with unread data resets it, so that the
    answer would be lost on them.
    """
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while num_bytes < _LINGER_BYTES:
                message = await receive()
                if not message.get("more_body"):
                    return
                num_bytes += len(message["body"])


def require_json(request: Request) -> None:
    """Raise 415 unless the body is declared to be JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != JSON:
        raise HTTPException(415, f"content-type: got {kind!r}, expected {JSON!r}")


def too_slow(num_bytes: int, timeout_s: float) -> HTTPException:
    """The error for a body that does not come. The connection cannot be used further."""
    return HTTPException(
        408,
        f"body: got {num_bytes} bytes and no end, expected all of it within {timeout_s} s",
        headers={"Connection": "close"},
    )


def too_large(num_bytes: int, max_bytes: int, *, at_least: bool = False) -> HTTPException:
    """The error for a body over its cap. The connection cannot be used further."""
    size = f"{num_bytes} bytes{' or more' if at_least else ''}"
    return HTTPException(
        413,
        f"body: got {size}, expected at most {max_bytes} bytes",
        headers={"Connection": "close"},
    )

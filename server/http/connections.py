"""Connections within limits: how many, how long a client may take, how much may wait for it.

What no route can see happens here: a request whose head never ends, an answer nobody reads.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from reft_core.errors import EngineUnavailable
from server.http.errors import error_response, http_error_body
from server.settings import Settings

log = structlog.get_logger(__name__)

_ALWAYS_ANSWERED = ("/healthz", "/readyz", "/metrics")


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may take, and how many there may be."""

    max_connections: int
    header_timeout_s: float
    max_header_bytes: int
    slow_reader_timeout_s: float
    send_buffer_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> ConnectionLimits:
        """Those that the settings name."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


def protocol_within(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """The class of connections for uvicorn."""
    return type("LimitedConnection", (LimitedProtocol,), {"limits": limits})


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 on one connection, within :attr:`limits`."""

    limits: ConnectionLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaiting_head: asyncio.TimerHandle | None = None
        self._awaiting_reader: asyncio.TimerHandle | None = None
        self._in_head = False
        self._in_message = False
        self._has_body = False
        self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.send_buffer_bytes)
        _bound_unsent(transport, self.limits.send_buffer_bytes)
        if len(self.connections) > self.limits.max_connections:
            self.app = _Full(self.app, self.limits.max_connections)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._awaiting_head = _stopped(self._awaiting_head)
        self._awaiting_reader = _stopped(self._awaiting_reader)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has come, and refuse a head that is too long, or what else is no body."""
        if self.transport.is_closing():
            return
        self._has_body = False
        super().data_received(data)
        # Extensions of chunks, and trailers, are kept too until the request is answered.
        self._num_head_bytes = 0 if self._has_body else self._num_head_bytes + len(data)
        if self.cycle is not None and self.cycle.response_complete:
            self._await_head()  # uvicorn waits no longer once anything comes, be it no request
        if self._in_message and self._num_head_bytes > self.limits.max_header_bytes:
            allowed = f"at most {self.limits.max_header_bytes} bytes"
            self._refuse(431, f"headers: got {self._num_head_bytes} bytes, expected {allowed}")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._in_message, self._num_head_bytes = True, True, 0
        self._awaiting_head = _stopped(self._awaiting_head)
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come. What follows a body is none: it may come after the checks."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head of a request is there."""
        self._in_head = False
        self._awaiting_head = _stopped(self._awaiting_head)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of a body has come."""
        self._has_body = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request has come."""
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is written, though perhaps not read."""
        super().on_response_complete()
        if self.transport.is_closing():  # it stays open until the client has read everything
            self._await_reader()

    def pause_writing(self) -> None:
        """More waits for the client than may."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """The client reads."""
        self._awaiting_reader = _stopped(self._awaiting_reader)
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come."""
        if self.transport.get_write_buffer_size():  # nor was the last answer read
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _await_head(self) -> None:
        if self._awaiting_head is None:
            after = self.limits.header_timeout_s
            self._awaiting_head = self.loop.call_later(after, self._give_up_on_head)

    def _await_reader(self) -> None:
        if self._awaiting_reader is None:
            after = self.limits.slow_reader_timeout_s
            self._awaiting_reader = self.loop.call_later(after, self._give_up_on_reader)

    def _give_up_on_head(self) -> None:
        self._awaiting_head = None
        if self._in_head:
            allowed = f"all of them within {self.limits.header_timeout_s} s"
            self._refuse(408, f"headers: got only some, expected {allowed}")
        else:
            self.transport.close()
            self._await_reader()

    def _give_up_on_reader(self) -> None:
        """End a connection whose client does not read; what answers it finds the client gone."""
        self._awaiting_reader = None
        log.info("client reads too slowly", timeout_s=self.limits.slow_reader_timeout_s)
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that no route will see, and close."""
        if self.transport.is_closing():
            return
        if self._in_head and (self.cycle is None or self.cycle.response_complete):
            body = json.dumps(http_error_body(status, message)).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                "content-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
        self._await_reader()


class _Full:
    """Answers for the application on connections beyond the limit, except to its operators."""

    def __init__(self, app: Any, most: int) -> None:
        self._app: ASGIApp = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        if scope["path"] in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send_last)
            return
        message = f"connections: there are more than {self._most}, the most that are served"
        response = error_response(EngineUnavailable(message))
        await response(scope, receive, send_last)


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer any more, the given one being stopped."""
    if timer is not None:
        timer.cancel()
    return None


def _bound_unsent(transport: asyncio.Transport, most: int) -> None:
    """Have the system's own buffer take no more than ``most`` bytes that it cannot send yet."""
    connection = transport.get_extra_info("socket")
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if connection is not None and option is not None:
        with suppress(OSError):  # not every kind of socket has it
            connection.setsockopt(socket.IPPROTO_TCP, option, most)

"""HTTP/1.1 as bytes: a client that reads what has come without looking at it until it is whole.

A client that took every event apart as it comes would cost as much as the server that sends it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LAST_CHUNK = b"\r\n0\r\n\r\n"


def post_bytes(path: str, body: Any, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole POST request with a JSON body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: load", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def get_bytes(path: str) -> bytes:
    """A whole GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: load\r\n\r\n".encode()


@dataclass
class Response:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error_code(self) -> str | None:
        """``code`` of OpenAI's error object, if the body is one."""
        try:
            code: str | None = json.loads(self.body)["error"]["code"]
        except (ValueError, KeyError, TypeError):
            return None
        return code

    def events(self) -> list[str]:
        """Data of a stream's events."""
        parts = self.body.decode().split("\n\n")
        return [part.removeprefix("data: ") for part in parts if part]


@dataclass
class Reader:
    """Gathers the bytes of one answer."""

    data: bytearray = field(default_factory=bytearray)
    _body_at: int = 0
    _length: int | None = None
    """Of a body that is not in chunks."""

    def feed(self, data: bytes) -> bool:
        """Take what has come; whether the answer is whole."""
        self.data += data
        if not self._body_at:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return False
            self._body_at = end + 4
            length = _headers(bytes(self.data[:end])).get("content-length")
            self._length = None if length is None else int(length)
        if self._length is not None:
            return len(self.data) >= self._body_at + self._length
        return self.data.endswith(_LAST_CHUNK)

    def response(self) -> Response:
        """The answer, which must be whole."""
        head = bytes(self.data[: self._body_at - 4])
        body = bytes(self.data[self._body_at :])
        status = int(head.split(b" ", 2)[1])
        return Response(status, _headers(head), body if self._length is not None else _joined(body))


def _headers(head: bytes) -> dict[str, str]:
    pairs = (line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
    return {name.lower(): value for name, value in pairs}


def _joined(body: bytes) -> bytes:
    """The content of a body in chunks."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2

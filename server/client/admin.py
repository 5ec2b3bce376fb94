"""The command line's side of ``/admin``: one request, its answer or the server's reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.client.address import server_url
from server.client.connection import document, in_words, options, refusal

_TIMEOUT_S = 120.0
_CHUNK_BYTES = 1 << 18
_KEY_IN = "REFT_ADMIN_KEY"


class AdminClient:
    """Talks to one server with an admin key, about one tenant's names."""

    def __init__(self, url: str, key: str, tenant: str = "") -> None:
        self._url = server_url(url)
        self._options = options(self._url, key, _TIMEOUT_S)
        self._tenant = tenant

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | None] | None = None,
        json: Any = None,
    ) -> dict[str, Any]:
        """The JSON answer of a route. Raises :class:`ReftError` with the server's reason."""
        with self._open(method, path, query=query, json=json) as response:
            response.read()
            return document(response, _KEY_IN)

    def upload(
        self,
        path: str,
        file: Path,
        headers: Mapping[str, str],
        on_sent: Callable[[int], None],
    ) -> dict[str, Any]:
        """Send ``file`` as the body, without reading it whole, and return the JSON answer.

        ``on_sent`` is told the bytes of each piece. Raises :class:`ReftError`.
        """
        given = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(file.stat().st_size),
            **headers,
        }
        with self._open("POST", path, content=_pieces(file, on_sent), headers=given) as response:
            response.read()
            return document(response, _KEY_IN)

    def download(self, path: str, out: Path) -> str:
        """Write the file of a route to ``out``, and return its SHA-256 as the server says it."""
        with self._open("GET", path) as response, out.open("wb") as file:
            for piece in response.iter_bytes():
                file.write(piece)
            return str(response.headers.get("ETag", "")).strip('"')

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | None] | None = None,
        **body: Any,
    ) -> Iterator[httpx.Response]:
        """The successful response to one request, its body not read yet."""
        given = {"tenant": self._tenant or None} | dict(query or {})
        asked = {name: value for name, value in given.items() if value is not None}
        with (
            in_words(self._url, has_timeout=False),
            httpx.Client(**self._options) as http,
            http.stream(method, path, params=asked, **body) as response,
        ):
            if not response.is_success:
                response.read()
                raise refusal(response, _KEY_IN)
            yield response


def _pieces(path: Path, on_sent: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece
            on_sent(len(piece))

"""The command line's side of ``/admin``: one request, its answer or the server's reason."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_core.errors import ReftError

_TIMEOUT_S = 120


class AdminClient:
    """Talks to one server with an admin key, about one tenant's names."""

    def __init__(self, url: str, key: str, tenant: str = "") -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ReftError(f"url: got {url!r}, expected one that begins with http:// or https://")
        self._url = url.rstrip("/")
        self._key = key
        self._tenant = tenant

    def call(
        self,
        method: str,
        path: str,
        *,
        file: Path | None = None,
        query: Mapping[str, str | int | None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON answer of a route. ``file`` is sent as the body, without being read whole.

        Raises :class:`ReftError` with the server's reason.
        """
        if file is None:
            with self._open(method, path, None, query, headers or {}) as response:
                return json.load(response)
        length = {"Content-Length": str(file.stat().st_size)}
        with (
            file.open("rb") as body,
            self._open(method, path, body, query, {**(headers or {}), **length}) as response,
        ):
            return json.load(response)

    def download(self, path: str, out: Path) -> str:
        """Write the file of a route to ``out``, and return its SHA-256 as the server says it."""
        with self._open("GET", path, None, None, {}) as response, out.open("wb") as file:
            shutil.copyfileobj(response, file)
            return str(response.headers["ETag"]).strip('"')

    def _open(
        self,
        method: str,
        path: str,
        body: Any,
        query: Mapping[str, str | int | None] | None,
        headers: Mapping[str, str],
    ) -> Any:
        """The response to one request, to be closed."""
        given = {"tenant": self._tenant or None} | dict(query or {})
        asked = urllib.parse.urlencode({k: v for k, v in given.items() if v is not None})
        request = urllib.request.Request(
            f"{self._url}{path}{'?' if asked else ''}{asked}",
            data=body,
            method=method,
            headers={
                "Authorization": f"Bearer {self._key}",
                "Content-Type": "application/octet-stream",
                **headers,
            },
        )
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise ReftError(_reason(error)) from None
        except urllib.error.URLError as error:
            raise ReftError(f"{self._url}: {error.reason}") from None


def adapter_path(name: str, rest: str = "") -> str:
    """The path of an adapter's routes."""
    return f"/admin/adapters/{urllib.parse.quote(name, safe='@:')}{rest}"


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server said, or else its status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url}: HTTP {error.code}"

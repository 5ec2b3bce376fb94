"""How the command line asks a running server: one JSON answer, or one clear error."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from reft_core.errors import ReftError

_TIMEOUT_S = 60


def call(url: str, key: str, method: str, path: str, body: str | None = None) -> Any:
    """The JSON answer of the server at ``url``. Raises :class:`ReftError` with its reason."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ReftError(f"url: got {url!r}, expected one that begins with http:// or https://")
    request = urllib.request.Request(
        f"{url.rstrip('/')}{path}",
        data=None if body is None else body.encode(),
        method=method,
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise ReftError(_reason(error)) from None
    except urllib.error.URLError as error:
        raise ReftError(f"{url}: {error.reason}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server said, or else its status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url}: HTTP {error.code}"

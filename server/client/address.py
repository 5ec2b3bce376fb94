"""Where a server is, however its address is written."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from reft_core.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000"


def server_url(url: str) -> str:
    """The address of the server, whether or not ``url`` names the ``/v1`` on it.

    Raises :class:`InvalidRequest` if it is no HTTP address.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise InvalidRequest.because("url", url, f"an address such as {DEFAULT_URL}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def api_url(url: str) -> str:
    """The address under which OpenAI's API is. Raises :class:`InvalidRequest`."""
    return f"{server_url(url)}/v1"


def adapter_path(name: str, rest: str = "") -> str:
    """The path of an adapter's routes, by any form of its name."""
    return f"/admin/adapters/{quote(name, safe='@:')}{rest}"

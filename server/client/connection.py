"""A connection to an OpenAI-compatible server, and what goes wrong with one in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import quote

import httpx

from reft_core.errors import ReftError
from server.client.address import api_url

MAX_LISTED = 1000
"""Models asked for in one listing."""
_CONNECT_TIMEOUT_S = 10.0
_KEY_IN = "REFT_API_KEY"


class StreamFailed(ReftError):
    """A stream ended with an error in the place of its next event."""


def options(base_url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    """What an httpx client of what is below ``base_url`` is made with."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
    return {"base_url": base_url, "headers": headers, "timeout": timeout}


class Client:
    """One server, asked one thing at a time."""

    def __init__(self, url: str, key: str | None, timeout_s: float = 600.0) -> None:
        self._http = httpx.Client(**options(api_url(url), key, timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The cards of the models, at most :data:`MAX_LISTED` adapters. Raises ReftError."""
        return list(self._get(f"/models?limit={MAX_LISTED}")["data"])

    def model(self, name: str) -> dict[str, Any]:
        """The card of one model, by any form of its name. Raises ReftError."""
        return dict(self._get(f"/models/{quote(name, safe='@:')}"))

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed chat completion. Raises ReftError, also in the middle."""
        with (
            in_words(self._url),
            self._http.stream("POST", "/chat/completions", json=body) as response,
        ):
            if response.is_error:
                response.read()
                raise refusal(response)
            for line in response.iter_lines():
                if (chunk := event(line)) is not None:
                    yield chunk

    def _get(self, path: str) -> dict[str, Any]:
        with in_words(self._url):
            return document(self._http.get(path))

    @property
    def _url(self) -> str:
        return str(self._http.base_url)


@contextmanager
def in_words(url: str, *, has_timeout: bool = True) -> Iterator[None]:
    """Turn failures of a connection to ``url`` into a :class:`ReftError` that says what to do.

    ``has_timeout`` says whether the command has the option ``--timeout``.
    """
    try:
        yield
    except httpx.ConnectError as error:
        raise ReftError(
            f"url: nothing answers at {url} ({_reason(error)}); start a server with `reft serve`, "
            "or give the address of one with --url"
        ) from None
    except httpx.TimeoutException:
        more = ", or allow more with --timeout" if has_timeout else ""
        raise ReftError(
            f"url: {url} did not answer in time; see whether the server is busy (/metrics){more}"
        ) from None
    except httpx.TransportError as error:
        raise ReftError(f"url: the connection to {url} broke off ({_reason(error)})") from None


def event(line: str) -> dict[str, Any] | None:
    """The chunk in one line of an event stream, None for a line without any.

    Raises :class:`StreamFailed` if the line is the server's error.
    """
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return None
    try:
        found = json.loads(data)
    except ValueError:
        raise StreamFailed("url: the stream has a line that is no JSON") from None
    if not isinstance(found, dict):
        raise StreamFailed("url: the stream has a line that is no chunk")
    if "error" in found:
        raise StreamFailed(_message(found) or "the server reports an error without saying which")
    return found


def document(response: httpx.Response, key_in: str = _KEY_IN) -> dict[str, Any]:
    """The object that a response says, whose body was read. Raises :class:`ReftError`."""
    if not response.is_success:
        raise refusal(response, key_in)
    try:
        found = response.json()
    except ValueError:
        raise _no_api(response) from None
    if not isinstance(found, dict):
        raise _no_api(response)
    return found


def refusal(response: httpx.Response, key_in: str = _KEY_IN) -> ReftError:
    """What a response with an error status says, and what to do about it. Its body was read.

    ``key_in`` is the variable that the command takes its key from.
    """
    try:
        message = _message(response.json())
    except ValueError:
        message = None
    if message is None:
        return _no_api(response)
    if response.status_code == 401:
        message += f"; give it with --key or in {key_in}"
    elif response.status_code == 429 and (seconds := response.headers.get("retry-after")):
        message += f"; try again in {seconds} s"
    return ReftError(message)


def _no_api(response: httpx.Response) -> ReftError:
    return ReftError(
        f"url: {response.url} answers with status {response.status_code} and nothing that "
        "OpenAI's API would say; give the address of an OpenAI-compatible server with --url"
    )


def _message(document: Any) -> str | None:
    """The message of an error object, in either of the forms that servers use."""
    if not isinstance(document, dict):
        return None
    error = document.get("error", document.get("detail"))
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__

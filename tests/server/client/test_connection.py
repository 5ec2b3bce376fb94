"""What goes wrong between a client and a server, each in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from reft_core.errors import InvalidRequest, ReftError
from server.client.address import api_url, server_url
from server.client.connection import Client, StreamFailed, event, in_words, refusal


@pytest.mark.parametrize("url", ["http://x:1", "http://x:1/", "http://x:1/v1", "http://x:1/v1/"])
def test_an_address_is_taken_with_and_without_its_path(url):
    assert api_url(url) == "http://x:1/v1"
    assert server_url(url) == "http://x:1"


@pytest.mark.parametrize("url", ["x:1", "file:///etc/passwd", "http://", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InvalidRequest, match="url: got"):
        api_url(url)


def test_a_server_that_is_not_there():
    with Client("http://127.0.0.1:9", None, 5) as client, pytest.raises(ReftError) as caught:
        client.models()
    assert "nothing answers at http://127.0.0.1:9/v1" in caught.value.message
    assert "reft serve" in caught.value.message


@pytest.mark.parametrize(
    ("failure", "mention"),
    [
        (httpx.ReadTimeout("x"), "did not answer in time"),
        (httpx.RemoteProtocolError("peer closed"), "broke off (peer closed)"),
    ],
)
def test_connections_that_fail_later(failure, mention):
    with pytest.raises(ReftError) as caught, in_words("http://x"):
        raise failure
    assert mention in caught.value.message


def answer(status: int, **content: object) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://x/v1/models"), **content)


@pytest.mark.parametrize(
    ("response", "mention"),
    [
        (answer(401, json={"error": {"message": "wrong key"}}), "wrong key; give it with --key"),
        (answer(404, json={"detail": "Not Found"}), "Not Found"),
        (answer(404, text="<html>"), "status 404 and nothing that OpenAI's API would say"),
        (
            answer(429, json={"error": {"message": "full"}}, headers={"Retry-After": "3"}),
            "full; try again in 3 s",
        ),
    ],
)
def test_refusals(response, mention):
    assert mention in refusal(response).message


def test_a_server_that_is_something_else(monkeypatch):
    found: Callable[..., httpx.Response] = lambda *_: answer(200, text="hello")  # noqa: E731
    monkeypatch.setattr(httpx.Client, "get", found)
    with Client("http://x", None) as client, pytest.raises(ReftError, match="nothing that OpenAI"):
        client.models()


def test_events():
    assert event('data: {"a": 1}') == {"a": 1}
    assert event('data:{"a": 1}') == {"a": 1}
    assert event("data: [DONE]") is None
    assert event("") is None
    assert event(": ping") is None
    for line in ("data: {", "data: 3", 'data: {"error": {"message": "no"}}'):
        with pytest.raises(StreamFailed):
            event(line)


def test_wrong_keys_against_a_real_server(on_socket):
    with (
        on_socket(api_key="right-key") as server,
        Client(server.url, "wrong", 10) as client,
    ):
        with pytest.raises(ReftError, match=r"wrong key.*--key"):
            client.models()
        with pytest.raises(ReftError, match=r"wrong key.*--key"):
            list(client.stream({"model": "x", "messages": []}))
        with Client(server.url, "right-key", 10) as other:
            assert other.models()[0]["id"] == "tiny-base"

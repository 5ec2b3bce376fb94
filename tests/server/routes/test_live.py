"""Real sockets: streams, clients that leave, adapters that change, the end of the process."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from reft_core.errors import RequestFailed
from tests.server.conftest import ADMIN
from tests.server.fakes import MODEL, make_adapter, wait_until

LONG = "abcdefghijklmnopqrstuvwxyz" * 4
ASK = {"model": MODEL.name, "prompt": "hi", "max_tokens": 200}


class Stream:
    """One streamed completion, read event by event."""

    def __init__(self, server, **body):
        self.client = httpx.Client(base_url=server.url, timeout=10)
        request = self.client.build_request(
            "POST", "/v1/completions", json=ASK | {"stream": True} | body
        )
        self.response = self.client.send(request, stream=True)
        assert self.response.status_code == 200
        self.lines = (line for line in self.response.iter_lines() if line)

    def next(self) -> dict:
        return json.loads(next(self.lines).removeprefix("data: "))

    def rest(self) -> tuple[str, str | None]:
        """The remaining text, and the last data line that is no chunk."""
        text = ""
        for line in self.lines:
            data = line.removeprefix("data: ")
            if data == "[DONE]" or "error" in json.loads(data):
                return text, data
            text += json.loads(data)["choices"][0]["text"]
        return text, None

    def close(self) -> None:
        self.response.close()
        self.client.close()


@contextmanager
def asking(server, path="/v1/completions", body=None, **fields):
    """A client that sends a request and leaves without having read an answer."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(ASK | fields if body is None else body).encode()
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data
        )
        yield


@pytest.fixture
def open_stream():
    opened: list[Stream] = []

    def start(server, **body) -> Stream:
        opened.append(Stream(server, **body))
        return opened[-1]

    yield start
    for stream in opened:
        stream.close()


def test_tokens_arrive_as_they_are_made(live, engine, open_stream):
    engine.reply = lambda _: LONG
    engine.pause()
    engine.step(1)
    stream = open_stream(live)
    assert stream.next()["choices"][0]["text"] == "a"
    engine.step(1)
    assert stream.next()["choices"][0]["text"] == "b"
    engine.resume()
    assert stream.rest() == (LONG[2:], "[DONE]")
    wait_until(lambda: engine.num_open == 0, "the request to end")
    assert engine.cancelled == []


def test_a_client_that_leaves_its_stream_cancels_the_work(live, engine, open_stream):
    digest = live.upload("tone", make_adapter(1))["digest"]
    engine.reply = lambda _: LONG
    engine.pause()
    engine.step(1)
    stream = open_stream(live, model="tone", n=2)
    stream.next()
    assert live.services.residency.num_users(digest) == 1
    stream.close()
    wait_until(lambda: len(engine.cancelled) == 2, "both choices to be cancelled")
    wait_until(lambda: live.services.residency.num_users(digest) == 0, "the adapter's release")
    assert engine.num_open == 0
    metrics = live.http.get("/metrics").text
    aborted = f'{{finished_reason="abort",model_name="{MODEL.name}"}}'
    assert f"reft_request_success_total{aborted} 2.0" in metrics


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_before_the_first_token_cancels_the_work(live, engine, streaming):
    digest = live.upload("tone", make_adapter(1))["digest"]
    engine.pause()
    with asking(live, model="tone", stream=streaming):
        wait_until(lambda: engine.num_open == 1, "the request to reach the engine")
    wait_until(lambda: len(engine.cancelled) == 1, "the request to be cancelled")
    wait_until(lambda: live.services.residency.num_users(digest) == 0, "the adapter's release")
    wait_until(
        lambda: 'status="499"' in live.http.get("/metrics").text, "the request to be counted"
    )


def test_a_client_that_leaves_while_its_adapter_loads_takes_nothing(live, engine):
    digest = live.upload("tone", make_adapter(1))["digest"]
    engine.load_gate = threading.Event()
    with asking(live, model="tone"):
        wait_until(lambda: live.services.residency.num_users(digest) == 1, "the load to begin")
    wait_until(lambda: live.services.residency.num_users(digest) == 0, "the adapter's release")
    engine.load_gate.set()
    wait_until(lambda: engine.adapters == {digest}, "the load to end")
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("failure", "message", "code"),
    [
        (RequestFailed("decode failed"), "decode failed", "request_failed"),
        (None, "without saying why", "request_failed"),
    ],
)
def test_an_error_in_a_stream_is_its_last_event(live, engine, open_stream, failure, message, code):
    engine.reply = lambda _: LONG
    engine.fail_after, engine.failure = 3, failure
    stream = open_stream(live)
    text, last = stream.rest()
    assert text == "abc"
    error = json.loads(last)["error"]
    assert message in error["message"]
    assert (error["type"], error["code"]) == ("server_error", code)
    assert list(stream.lines) == []


def test_an_error_before_the_first_token_has_a_status(live, engine):
    engine.fail_after, engine.failure = 0, RequestFailed("prefill failed")
    answer = live.http.post("/v1/completions", json=ASK | {"stream": True})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "prefill failed"


def test_one_choice_that_fails_ends_the_others(live, engine, open_stream):
    engine.reply = lambda request: "ab" if request.params.seed == 1 else LONG
    engine.pause()
    engine.step(1)
    stream = open_stream(live, n=2, seed=1)
    engine.fail_after, engine.failure = 2, RequestFailed("broken")
    engine.resume()
    _, last = stream.rest()
    assert json.loads(last)["error"]["message"] == "broken"
    wait_until(lambda: engine.num_open == 0, "all to end")


# Adapters that change under running requests ------------------------------------------------


def test_uploads_do_not_disturb_running_streams(live, engine, open_stream):
    old = live.upload("tone", make_adapter(1))["digest"]
    engine.reply = lambda request: f"{request.adapters[0].digest[:8]}:{LONG}"
    engine.pause()
    engine.step(1)
    stream = open_stream(live, model="tone")
    first = stream.next()
    assert first["reft"]["digest"] == old

    new = live.upload("tone", make_adapter(2))["digest"]
    engine.step(1)
    assert stream.next()["choices"][0]["text"] == old[1]
    engine.step(1)
    other = open_stream(live, model="tone")
    assert other.next()["reft"]["digest"] == new
    pinned = open_stream(live, model=f"tone@sha256:{old[:16]}")
    engine.resume()
    assert pinned.next()["reft"]["digest"] == old
    assert stream.rest()[1] == "[DONE]"
    text, end = other.rest()
    assert (text.split(":")[1], end) == (LONG, "[DONE]")


def test_deleting_does_not_disturb_running_streams(live, engine, open_stream):
    digest = live.upload("tone", make_adapter(1))["digest"]
    engine.reply = lambda _: LONG
    engine.pause()
    engine.step(1)
    stream = open_stream(live, model="tone")
    stream.next()
    assert live.http.delete("/admin/adapters/tone", headers=ADMIN).status_code == 200
    refused = live.http.post("/v1/completions", json=ASK | {"model": "tone"})
    assert refused.status_code == 404
    assert engine.adapters == {digest}
    engine.resume()
    assert stream.rest() == (LONG[1:], "[DONE]")
    wait_until(lambda: engine.adapters == set(), "the adapter to leave with its last user")


def test_many_adapters_and_clients_at_once(on_socket, engine):
    """Each answer comes from the adapter that was asked, in room for three of eight."""
    files = {f"a{i}": make_adapter(i) for i in range(8)}
    with on_socket() as server:
        digests = {name: server.upload(name, data)["digest"] for name, data in files.items()}
        server.services.residency._budget_bytes = 3 * len(files["a0"])
        wrong: list[str] = []

        def client(worker: int) -> None:
            with httpx.Client(base_url=server.url, timeout=20) as http:
                for turn in range(10):
                    name = f"a{(worker * 5 + turn) % 8}"
                    answer = http.post("/v1/completions", json=ASK | {"model": name})
                    if answer.status_code == 429:
                        continue
                    expected = f"I am {digests[name][:6]}."
                    if answer.json()["choices"][0]["text"] != expected:
                        wrong.append(answer.text)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(engine.adapters) <= 3
        assert engine.num_open == 0


# The end ------------------------------------------------------------------------------------


def test_a_signal_lets_open_requests_finish(live, engine, open_stream):
    engine.reply = lambda _: LONG
    engine.pause()
    engine.step(1)
    stream = open_stream(live)
    stream.next()
    live.uvicorn.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: live.http.get("/readyz").status_code == 503, "readiness to go")
    assert live.http.get("/healthz").status_code == 200
    assert live.http.post("/v1/completions", json=ASK).status_code == 503
    engine.resume()
    assert stream.rest() == (LONG[1:], "[DONE]")
    stream.close()
    live.thread.join(10)
    assert not live.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{live.url}/healthz")


def test_what_outlasts_the_drain_timeout_gets_an_error(on_socket, engine, open_stream):
    engine.reply = lambda _: LONG
    with on_socket(drain_timeout_s=0.3) as server:
        engine.pause()
        engine.step(1)
        stream = open_stream(server)
        stream.next()
        began_at = time.monotonic()
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        _, last = stream.rest()
        assert json.loads(last)["error"]["code"] == "engine_unavailable"
        stream.close()
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert time.monotonic() - began_at < 5


def test_a_signal_delivered_twice_is_one(on_socket, engine):
    with on_socket() as server:
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_a_later_signal_ends_at_once(on_socket, monkeypatch):
    statuses: list[int] = []
    monkeypatch.setattr("server.http.run._SAME_SIGNAL_S", 0)
    monkeypatch.setattr("server.http.run.os._exit", statuses.append)
    with on_socket(drain_timeout_s=60) as server:
        server.uvicorn.handle_exit(signal.SIGINT, None)
        assert statuses == []
        server.uvicorn.handle_exit(signal.SIGINT, None)
        assert statuses == [130]

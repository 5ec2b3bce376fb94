"""Every limit: what is just within is accepted, what is just beyond is refused as it says."""

from __future__ import annotations

import json
import socket
import struct
import time
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import Request, SamplingParams
from reft_core.errors import EngineOverloaded
from tests.server.conftest import ADMIN
from tests.server.fakes import MODEL, make_adapter, make_tiny_loaded, wait_until

ASK: dict[str, Any] = {"model": MODEL.name, "prompt": "hi", "max_tokens": 4}
CHAT = {"model": MODEL.name, "messages": [{"role": "user", "content": "hi"}]}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
CLASSIFY = "/v1/classify"


def is_error(answer: httpx.Response, status: int, code: str) -> bool:
    error = answer.json()["error"]
    return (answer.status_code, error["code"]) == (status, code) and bool(error["message"])


FIELDS = [
    # settings, path, body, what is just within, what is just beyond, code
    ({"max_prompt_tokens": 5}, COMPLETIONS, ASK, {"prompt": "abcde"}, {"prompt": "abcdef"},
     "context_length_exceeded"),
    ({"max_prompt_tokens": 3}, COMPLETIONS, ASK, {"prompt": [1, 2, 3]}, {"prompt": [1, 2, 3, 4]},
     "context_length_exceeded"),
    ({"max_answer_tokens": 7}, COMPLETIONS, ASK, {"max_tokens": 7}, {"max_tokens": 8},
     "invalid_value"),
    ({"max_answer_tokens": 7}, CHATS, CHAT, {"max_tokens": 7}, {"max_tokens": 8}, "invalid_value"),
    ({"max_answer_tokens": 7}, CHATS, CHAT, {"max_completion_tokens": 7},
     {"max_completion_tokens": 8}, "invalid_value"),
    ({"max_logprobs": 2}, COMPLETIONS, ASK, {"logprobs": 2}, {"logprobs": 3}, "invalid_value"),
    ({"max_logprobs": 2}, COMPLETIONS, ASK, {"prompt_logprobs": 2}, {"prompt_logprobs": 3},
     "invalid_value"),
    ({"max_logprobs": 2}, CHATS, {**CHAT, "logprobs": True}, {"top_logprobs": 2},
     {"top_logprobs": 3}, "invalid_value"),
    ({"max_prompt_logprobs": 12}, COMPLETIONS, ASK | {"prompt_logprobs": 2}, {"prompt": "abcd"},
     {"prompt": ["abcd", "e"]}, "invalid_value"),
    ({"max_prompt_logprobs": 12}, COMPLETIONS, ASK | {"echo": True, "logprobs": 2, "n": 2},
     {"prompt": "ab"}, {"prompt": "abc"}, "invalid_value"),
    ({"max_prompt_logprobs": 12}, COMPLETIONS, ASK | {"prompt_logprobs": 1, "prompt": "abc"},
     {"reft": {"models": [MODEL.name] * 2}}, {"reft": {"models": [MODEL.name] * 3}},
     "invalid_value"),
    ({"max_n": 3}, COMPLETIONS, ASK, {"n": 3}, {"n": 4}, "invalid_value"),
    ({"max_prompts": 2}, COMPLETIONS, ASK, {"prompt": ["a"] * 2}, {"prompt": ["a"] * 3},
     "invalid_value"),
    ({"max_stop": 2}, COMPLETIONS, ASK, {"stop": ["x"] * 2}, {"stop": ["x"] * 3}, "invalid_value"),
    ({"max_stop_chars": 4}, COMPLETIONS, ASK, {"stop": "x" * 4}, {"stop": "x" * 5},
     "invalid_value"),
    ({"max_prompt_tokens": 30}, CLASSIFY, {"model": MODEL.name, "labels": ["a", "b"]},
     {"input": "hi"}, {"input": ["hi", "x" * 31]}, "context_length_exceeded"),
    ({"max_fan_out": 2}, COMPLETIONS, ASK, {"reft": {"models": [MODEL.name] * 2}},
     {"reft": {"models": [MODEL.name] * 3}}, "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("limits", "path", "body", "within", "beyond", "code"), FIELDS)
def test_fields_of_a_request(in_process, limits, path, body, within, beyond, code):
    with in_process(**limits) as server:
        answer = server.http.post(path, json=body | within)
        assert answer.status_code == 200, answer.text
        answer = server.http.post(path, json=body | beyond)
        assert is_error(answer, 400, code), answer.text
        assert str(next(iter(limits.values()))) in answer.json()["error"]["message"]


def test_an_answer_without_a_limit_of_its_own_gets_the_servers(in_process, engine):
    with in_process(max_answer_tokens=7) as server:
        bodies = (ASK | {"max_tokens": None}, {"model": MODEL.name, "prompt": "hi"})
        for path, body in ((CHATS, CHAT), *((COMPLETIONS, body) for body in bodies)):
            assert server.http.post(path, json=body).status_code == 200
            assert engine.submitted[-1].params.max_tokens == 7


def test_bodies(in_process):
    padded = json.dumps(ASK | {"user": ""})
    for size, status in ((2048, 200), (2049, 413)):
        with in_process(max_body_bytes=2048) as server:
            body = json.dumps(ASK | {"user": "x" * (size - len(padded))})
            kind = {"content-type": "application/json"}
            answer = server.http.post(COMPLETIONS, content=body, headers=kind)
            assert answer.status_code == status, answer.text


# The queue ----------------------------------------------------------------------------------


def ask(request_id: str, length: int) -> Request:
    return Request(request_id, (5,) * length, SamplingParams(max_tokens=2, temperature=0))


def test_waiting_tokens():
    """Counted until a prompt begins; what is submitted together is taken or refused together."""
    config = EngineConfig(max_model_len=64, max_num_seqs=1, max_waiting_tokens=30)
    engine = EmbeddedEngine(make_tiny_loaded(), config)
    outputs: list[str] = []

    def sink(output):
        if output.finish_reason is not None:
            outputs.append(output.request_id)

    engine.submit(ask("a", 20), sink)
    engine.submit(ask("b", 9), sink)
    with engine.together():  # 29 tokens wait: one below
        engine.submit(ask("c", 1), sink)
        engine.submit(ask("d", 40), sink)
    with pytest.raises(EngineOverloaded, match="70 tokens wait, at most 30"):
        engine.submit(ask("e", 1), sink)
    engine.cancel("d")
    engine.step()  # a begins, d ends
    engine.submit(ask("f", 20), sink)  # 10 tokens wait
    with pytest.raises(EngineOverloaded, match="30 tokens wait"):
        engine.submit(ask("g", 1), sink)
    for _ in range(40):
        engine.step()
    assert sorted(outputs) == ["a", "b", "c", "d", "f"]
    engine.submit(ask("h", 1), sink)


def test_a_full_queue_asks_to_come_back_and_then_takes_the_request(in_process, engine):
    engine.refuse_with = EngineOverloaded("the queue is full", retry_after_s=1.2)
    with in_process() as server:
        answer = server.http.post(COMPLETIONS, json=ASK)
        assert is_error(answer, 429, "engine_overloaded")
        assert answer.headers["retry-after"] == "2"
        engine.refuse_with = None
        assert server.http.post(COMPLETIONS, json=ASK).status_code == 200


# Connections --------------------------------------------------------------------------------


@contextmanager
def connected(server, receive_buffer: int | None = None):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect((host, int(port)))
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def head_of(path: str, length: int, more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def test_headers_that_never_end(on_socket):
    with on_socket(header_timeout_s=0.3) as server, connected(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        for _ in range(3):
            time.sleep(0.05)
            connection.sendall(b"X-More: y\r\n")
        assert error_of(read_to_end(connection)) == (408, "request_timeout")


def test_a_connection_that_says_nothing_is_closed(on_socket):
    with on_socket(header_timeout_s=0.2) as server, connected(server) as connection:
        assert read_to_end(connection) == b""


def test_headers_that_come_slowly_but_in_time(on_socket):
    body = json.dumps(ASK).encode()
    with on_socket(header_timeout_s=5) as server, connected(server) as connection:
        for byte in head_of(COMPLETIONS, len(body), "Connection: close\r\n"):
            connection.sendall(bytes([byte]))
        connection.sendall(body)
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("excess", "status"), [(0, 200), (1024, 431)])
def test_headers_that_are_long(on_socket, excess, status):
    with on_socket(max_header_bytes=4096) as server, connected(server) as connection:
        head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Long: "
        connection.sendall(head + b"x" * (4000 - len(head) + excess))
        time.sleep(0.1)
        if status == 200:
            connection.sendall(b"\r\n\r\n")
            assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")
        else:
            assert error_of(read_to_end(connection)) == (431, "request_header_fields_too_large")


@pytest.mark.parametrize(
    ("request_head", "rest"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n", b"x"),
        (head_of("/admin/adapters/strange", 500), b"x"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
    ],
    ids=["a body that nobody wants", "a body that was refused", "an empty line"],
)
def test_what_comes_after_an_answer_does_not_keep_the_connection(on_socket, request_head, rest):
    with on_socket(header_timeout_s=0.3) as server, connected(server) as connection:
        connection.sendall(request_head)
        wait_until(lambda: b"}" in connection.recv(4096), "the answer")
        connection.sendall(rest)
        assert b"HTTP/1.1" not in read_to_end(connection)


def test_a_body_that_comes_after_its_answer_leaves_time_for_another_request(on_socket):
    with on_socket(header_timeout_s=0.6) as server, connected(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
        wait_until(lambda: b"}" in connection.recv(4096), "the answer")
        connection.sendall(b"xy")
        time.sleep(0.4)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        time.sleep(0.4)
        connection.sendall(b"Connection: close\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


CHUNKED = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
).encode()


@pytest.mark.parametrize("padding", [b"0\r\nX-Trailer: ", b"1;ext="], ids=["trailer", "extension"])
def test_what_is_no_body_between_chunks_is_bounded(on_socket, padding):
    with on_socket(max_header_bytes=4096) as server, connected(server) as connection:
        connection.sendall(CHUNKED + b"1\r\n{\r\n" + padding)
        with suppress(ConnectionError):
            for _ in range(64):
                connection.sendall(b"x" * 1024)
                time.sleep(0.002)
            assert connection.recv(1) == b""


def test_a_body_in_tiny_chunks_is_no_long_head(on_socket):
    body = json.dumps(ASK | {"user": "x" * 2000}).encode()
    with on_socket(max_header_bytes=4096) as server, connected(server) as connection:
        connection.sendall(CHUNKED)
        for byte in body:
            connection.sendall(b"1\r\n%c\r\n" % byte)
        connection.sendall(b"0\r\nX-Trailer: y\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", [COMPLETIONS, "/admin/adapters/late"])
def test_a_body_that_never_ends(on_socket, engine, path):
    limits = {"body_timeout_s": 0.3, "upload_timeout_s": 0.3}
    authorization = f"Authorization: {ADMIN['Authorization']}\r\n"
    with on_socket(**limits) as server, connected(server) as connection:
        connection.sendall(head_of(path, 500, authorization))
        for _ in range(3):
            connection.sendall(b"{")
            time.sleep(0.02)
        assert error_of(read_to_end(connection)) == (408, "request_timeout")
        assert engine.submitted == []
        assert server.http.post(COMPLETIONS, json=ASK).status_code == 200


def test_trailers_are_no_headers(on_socket):
    body = json.dumps(ASK)
    with on_socket() as server, connected(server) as connection:
        head = head_of(COMPLETIONS, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        chunk = f"{len(body):x}\r\n{body}\r\n0\r\n".encode()
        connection.sendall(head + chunk + b"X-Request-Id: late\r\n\r\n")
        answer = connection.recv(65536).lower()
        assert answer.startswith(b"http/1.1 200 ")
        assert b"late" not in answer


def test_the_time_for_the_body_does_not_count_the_answer(on_socket, engine):
    engine.pause()
    with on_socket(body_timeout_s=0.2) as server, connected(server) as connection:
        body = json.dumps(ASK).encode()
        connection.sendall(head_of(COMPLETIONS, len(body), "Connection: close\r\n") + body)
        wait_until(lambda: engine.num_open == 1, "the request to be in the engine")
        time.sleep(0.4)
        engine.resume()
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_connections_beyond_the_limit(on_socket):
    with on_socket(max_connections=3) as server:  # one of them is the fixture's own client
        assert server.http.post(COMPLETIONS, json=ASK).status_code == 200
        with connected(server), connected(server):
            with httpx.Client(base_url=server.url) as another:
                answer = another.post(COMPLETIONS, json=ASK)
                assert is_error(answer, 503, "engine_unavailable")
                assert int(answer.headers["retry-after"]) > 0
                assert answer.headers["connection"] == "close"
                for _ in range(2):
                    answer = another.get("/healthz")
                    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            assert server.http.post(COMPLETIONS, json=ASK).status_code == 200

        def is_served() -> bool:
            with httpx.Client(base_url=server.url) as another:
                return another.post(COMPLETIONS, json=ASK).status_code == 200

        wait_until(is_served, "room for another connection")


def test_idle_connections_are_closed_after_a_while(on_socket):
    with on_socket(keep_alive_timeout_s=1) as server, connected(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


LONG = {"max_tokens": 20_000, "stream": True, "ignore_eos": True}


def test_a_reader_that_stops_is_cut_off_and_its_request_cancelled(on_socket, engine):
    engine.max_model_len = 30_000
    limits = {"slow_reader_timeout_s": 0.4, "send_buffer_bytes": 4096}
    with on_socket(**limits) as server, connected(server, 4096) as connection:
        engine.pause()
        body = json.dumps(ASK | LONG).encode()
        connection.sendall(head_of(COMPLETIONS, len(body)) + body)
        wait_until(lambda: engine.num_open == 1, "the request to be in the engine")
        engine.step(2000)  # more than the buffers take, and not the end
        wait_until(lambda: engine.num_open == 0, "the request to be cancelled")
        assert engine.cancelled
        engine.resume()
        assert server.http.post(COMPLETIONS, json=ASK).status_code == 200


def test_a_reader_that_pauses_for_less_gets_everything(on_socket, engine):
    engine.max_model_len = 30_000
    limits = {"slow_reader_timeout_s": 8, "send_buffer_bytes": 4096}
    with on_socket(**limits) as server, connected(server, 4096) as connection:
        usage = {"stream_options": {"include_usage": True}}
        body = json.dumps(ASK | LONG | {"max_tokens": 2000} | usage).encode()
        connection.sendall(head_of(COMPLETIONS, len(body), "Connection: close\r\n") + body)
        time.sleep(0.5)
        answer = read_to_end(connection)
        assert b'"completion_tokens":2000' in answer
        assert b"data: [DONE]" in answer


def test_an_answer_that_is_never_read_does_not_keep_its_connection(on_socket, engine):
    """Also when it is written whole, and the connection is to be closed after it."""
    engine.reply = lambda _: "x" * 1000
    engine.max_model_len = 300_000
    limits = {"slow_reader_timeout_s": 0.3, "send_buffer_bytes": 1024}
    with on_socket(**limits) as server, connected(server, 2048) as connection:
        body = json.dumps(ASK | {"max_tokens": 100_000}).encode()
        connection.sendall(head_of(COMPLETIONS, len(body), "Connection: close\r\n") + body)
        connections = server.uvicorn.server_state.connections
        wait_until(lambda: len(connections) == 1, "the connection to be there")
        wait_until(lambda: not connections, "the connection to be given up", 15)


def test_a_client_that_resets_frees_its_slot(on_socket, engine):
    engine.pause()
    with on_socket() as server, connected(server) as connection:
        body = json.dumps(ASK | {"stream": True}).encode()
        connection.sendall(head_of(COMPLETIONS, len(body)) + body)
        wait_until(lambda: engine.num_open == 1, "the request to be in the engine")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        wait_until(lambda: engine.num_open == 0, "the request to be cancelled")


def test_uploads_have_a_time_of_their_own(on_socket):
    with on_socket(body_timeout_s=0.05, upload_timeout_s=10) as server:
        data = make_adapter()

        def pieces():
            for at in range(0, len(data), 1 + len(data) // 5):
                yield data[at : at + 1 + len(data) // 5]
                time.sleep(0.05)

        answer = server.http.post("/admin/adapters/slow", content=pieces(), headers=ADMIN)
        assert answer.status_code == 201, answer.text

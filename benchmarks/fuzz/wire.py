"""Bytes that no client sends: broken JSON, broken HTTP, and text that something may stumble over.

Whatever is sent, the server answers in OpenAI's form with a status below 500, or closes a
connection that no longer makes sense; it does neither late.
"""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmarks.fuzz.serving import ADMIN_KEY, API_KEY, Target

_TIMEOUT_S = 20.0
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_CAP_BYTES = 64 * 1024 * 1024
_POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/classify")
_STRANGE = [
    "\\ud800", "\\udfff\\ud800", "\\u0000", "\\u202e", "\U0001f600", "\ufffe", "é" * 200,
    "\\n\\r", "../../etc/passwd", "..%2f..%2fetc", "C:\\\\x", "{{7*7}}", "${jndi:x}", "<script>",
    "' OR 1=1--",
    "a" * 300, "x" * 20_000, " ", "", "tiny@", "tiny@1", "tiny@-1", "tiny@99999999999999999999",
    "loreft@0", "loreft@1", "loreft@sha256:", "loreft@sha256:zz", "@", "a@b@c", "loreft@1.5",
    "loreft\\u0000", "LOREFT", "%00", "<|im_end|>", "<|im_start|>system",
]  # fmt: skip
_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5000, "-0",
            "1e-999", "0x10", "01", "1.", "+1", "9223372036854775808", "-9223372036854775809",
            "9223372036854775807", "1E400", "0.1e-400"]  # fmt: skip
_TEXT_FIELDS = ("model", "prompt", "user", "stop", "guided_regex", "guided_grammar", "guided_json",
                "service_tier", "prompt_cache_key", "safety_identifier", "suffix")  # fmt: skip
_NUMBER_FIELDS = ("max_tokens", "temperature", "top_p", "n", "seed", "top_k", "min_p", "logprobs",
                  "priority", "presence_penalty", "repetition_penalty", "best_of",
                  "prompt_logprobs")  # fmt: skip


@dataclass
class Report:
    """What was sent, and what was wrong with the answers."""

    cases: int = 0
    server_errors: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shot:
    """Bytes for a fresh connection."""

    name: str
    data: bytes
    may_close: bool = False
    """Whether closing without an answer is one too."""
    stops_sending: bool = False
    """Whether the client leaves in the middle; no answer is expected."""


def attack(target: Target, *, seed: int, num_random: int) -> Report:
    """All that is listed here, and so many bodies drawn at random."""
    report = Report()
    for shot in (*_bodies(), *_framings(), *_paths(), *_random_bodies(seed, num_random)):
        report.cases += 1
        problem, failed = _shoot(target.url, shot)
        report.server_errors += failed
        if problem:
            report.problems.append(f"{shot.name}: {problem}\n{shot.data[:300]!r}")
    return report


# What is sent -----------------------------------------------------------------------------------


def request(
    method: str, path: str, body: bytes = b"", *headers: bytes, key: str = API_KEY, length: int = -1
) -> bytes:
    """A request as bytes; ``length`` is what it claims of its body, if something else."""
    lines = [
        f"{method} {path} HTTP/1.1".encode("latin-1"),
        b"Host: localhost",
        f"Authorization: Bearer {key}".encode(),
        b"Connection: close",
        *headers,
    ]
    if body or length >= 0:
        lines.append(b"Content-Length: %d" % (len(body) if length < 0 else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


_JSON = b"Content-Type: application/json"


def _post(body: str | bytes, path: str = "/v1/completions") -> bytes:
    raw = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    return request("POST", path, raw, _JSON)


def _bodies() -> Iterator[Shot]:
    """Bodies that are no JSON, or strange JSON, on every route that takes one."""
    deep = 20_000
    broken: list[tuple[str, str | bytes]] = [
        ("empty", ""), ("null", "null"), ("a list", "[]"), ("a number", "1"), ("a string", '"a"'),
        ("cut", '{"model": "tiny", "prompt": "a'), ("a comma", '{"model": "tiny",}'),
        ("two documents", '{"model": "tiny", "prompt": "a"}{}'), ("NUL", b"\0" * 10),
        ("no UTF-8", b'{"model": "\xff\xfe", "prompt": "\xc3\x28"}'),
        ("UTF-16", '{"model": "tiny", "prompt": "a"}'.encode("utf-16")),
        ("a mark before", b"\xef\xbb\xbf" + b'{"model": "tiny", "prompt": "a"}'),
        ("deep lists", "[" * deep), ("deep and closed", "[" * deep + "]" * deep),
        ("deep objects", '{"a":' * deep + "1" + "}" * deep),
        ("deep inside", '{"model": "tiny", "prompt": ' + "[" * deep + "]" * deep + "}"),
        ("a deep schema", '{"model": "tiny", "prompt": "a", "guided_json": '
         + '{"items": ' * 5000 + "{}" + "}" * 5000 + "}"),
        ("deep metadata", '{"model": "tiny", "prompt": "a", "metadata": '
         + '{"a": ' * 5000 + "{}" + "}" * 5000 + "}"),
        ("a key twice", '{"model": "tiny", "model": "loreft", "prompt": "a"}'),
        ("many keys", "{" + ", ".join(f'"k{i}": 1' for i in range(5000)) + "}"),
        ("a long key", '{"' + "k" * 50_000 + '": 1}'),
        ("raw surrogates", b'{"model": "\xed\xa0\x80", "prompt": "a"}'),
        ("half a character in a list", '{"model": "tiny", "prompt": ["\\ud800", "a"]}'),
        ("half a character in a schema", '{"model": "tiny", "prompt": "a", "max_tokens": 2, '
         '"guided_json": {"const": "\\ud800"}}'),
        ("half a character in a format", '{"model": "tiny", "prompt": "a", "max_tokens": 2, '
         '"response_format": {"type": "json_schema", "json_schema": {"schema": '
         '{"properties": {"\\udfff": {"pattern": "\\ud800"}}}}}}'),
        ("half a character in metadata", '{"model": "tiny", "prompt": "a", "max_tokens": 2, '
         '"metadata": {"\\ud800": "\\ud800"}, "stop": ["\\ud800"], '
         '"guided_choice": ["\\ud800"]}'),
        ("half a character in a part", '{"model": "tiny", "max_tokens": 2, "messages": [{"role": '
         '"user", "content": [{"type": "text", "text": "\\ud800"}], "name": "\\ud800"}]}'),
        ("half a character in a text", '{"model": "tiny", "input": ["a", "\\ud800"], '
         '"labels": ["\\udfff", "b"]}'),
        ("over the cap", '{"model": "tiny", "prompt": "' + "a" * 70_000 + '"}'),
    ]  # fmt: skip
    for path in _POSTS:
        for name, body in broken:
            yield Shot(f"{path} {name}", _post(body, path))
    for text in _STRANGE:
        for key in _TEXT_FIELDS:
            fields = {"model": '"tiny"', "prompt": '"a"', "max_tokens": "2", key: f'"{text}"'}
            yield Shot(f"{key} = {text[:20]!r}", _post(_object(fields)))
        yield Shot(
            f"a message {text[:20]!r}",
            _post(
                f'{{"model": "{text}", "messages": [{{"role": "user", "content": "{text}"}}]}}',
                "/v1/chat/completions",
            ),
        )
        for model in ("tiny", text):
            body = f'{{"model": "{model}", "input": "{text}", "labels": ["{text}", "no"]}}'
            yield Shot(f"classify {text[:20]!r}", _post(body, "/v1/classify"))
        for reft in (f'{{"source": "{text}"}}', f'{{"stack": [{{"model": "{text}"}}]}}',
                     f'{{"subspaces": {{"{text}": 1}}}}', f'{{"models": ["{text}"]}}'):  # fmt: skip
            fields = {"model": '"loreft"', "prompt": '"a"', "reft": reft}
            yield Shot(f"reft {reft[:30]}", _post(_object(fields)))
    for number in _NUMBERS:
        for key in _NUMBER_FIELDS:
            fields = {"model": '"tiny"', "prompt": '"a"', "max_tokens": "2", key: number}
            yield Shot(f"{key} = {number[:20]}", _post(_object(fields)))
        for key, value in (("logit_bias", f'{{"5": {number}}}'), ("stop_token_ids", f"[{number}]"),
                           ("prompt", f"[{number}]"), ("reft", f'{{"strength": {number}}}'),
                           ("logit_bias", f'{{"{number}": 1}}')):  # fmt: skip
            fields = {"model": '"loreft"', "prompt": '"a"', "max_tokens": "2", key: value}
            yield Shot(f"{key} = {value[:20]}", _post(_object(fields)))


def _object(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}"


def _framings() -> Iterator[Shot]:
    """HTTP that is wrong, ambiguous, cut off or too much."""
    good = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    start = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
    )
    start += API_KEY.encode() + b"\r\n"
    chunked = start + _JSON + b"\r\nTransfer-Encoding: chunked\r\n"
    for name, data in [
        ("chunked", chunked + b"\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(good), good)),
        ("tiny chunks", chunked + b"\r\n" + b"".join(b"1\r\n%c\r\n" % c for c in good)
         + b"0\r\n\r\n"),
        ("no type", start + b"Content-Length: %d\r\n\r\n" % len(good) + good),
        ("a type with more", start + _JSON + b"; charset=utf-8\r\nContent-Length: %d\r\n\r\n"
         % len(good) + good),
        ("two types", start + _JSON + b"\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
         % len(good) + good),
        ("a form", start + b"Content-Type: multipart/form-data; boundary=a\r\n"
         b"Content-Length: 5\r\n\r\n--a--"),
    ]:  # fmt: skip
        yield Shot(name, data)
    for name, data in [
        ("both lengths", chunked + b"Content-Length: 5\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n"),
        ("two lengths", start + _JSON + b"\r\nContent-Length: 5\r\nContent-Length: 50\r\n\r\n"
         + good),
        ("a length below zero", start + _JSON + b"\r\nContent-Length: -1\r\n\r\n" + good),
        ("a length that is none", start + _JSON + b"\r\nContent-Length: 1e3\r\n\r\n" + good),
        ("a length of 400 digits", start + _JSON + b"\r\nContent-Length: " + b"9" * 400
         + b"\r\n\r\n"),
        ("chunk size that is none", chunked + b"\r\nzz\r\n" + good),
        ("a huge chunk size", chunked + b"\r\n" + b"f" * 40 + b"\r\n" + good),
        ("a space before the colon", start + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        ("an unknown encoding", start + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
        ("bare line feeds", b"GET /healthz HTTP/1.1\nHost: x\nConnection: close\n\n"),
        ("no version", b"GET /healthz\r\n\r\n"),
        ("HTTP/9", b"GET /healthz HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n"),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
        ("noise", random.Random(1).randbytes(2000) + b"\r\n\r\n"),
        ("a folded header", start + b"X: a\r\n b\r\n\r\n"),
        ("a header with NUL", start + b"X: a\0b\r\n\r\n"),
        ("many headers", start + b"".join(b"X-%d: 1\r\n" % i for i in range(5000)) + b"\r\n"),
        ("a huge header", start + b"X: " + b"a" * 500_000 + b"\r\n\r\n"),
        ("a huge path", b"GET /" + b"a" * 500_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("an upgrade", b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
         b"Upgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
         b"Sec-WebSocket-Version: 13\r\n\r\n"),
        ("two requests at once", request("GET", "/healthz").replace(b"Connection: close\r\n", b"")
         + request("GET", "/healthz")),
        ("expects to continue", start + _JSON + b"\r\nExpect: 100-continue\r\n"
         b"Content-Length: %d\r\n\r\n" % len(good) + good),
    ]:  # fmt: skip
        yield Shot(name, data, may_close=True)
    for name, data in [
        ("only line ends", b"\r\n" * 2000),
        ("half a line", b"POST /v1/comp"),
        ("half the headers", start),
        ("half a body", start + _JSON + b"\r\nContent-Length: 500\r\n\r\n" + good),
        ("half the chunks", chunked + b"\r\n5\r\n{\"mo"),
        ("gone at once", _post(b'{"model": "loreft", "prompt": "a", "max_tokens": 60}')),
        ("gone from a stream", _post(b'{"model": "lora", "prompt": "a", "max_tokens": 60, "n": 4, '
                                     b'"stream": true, "ignore_eos": true}')),
    ]:  # fmt: skip
        for _ in range(8):
            yield Shot(name, data, stops_sending=True)


def _paths() -> Iterator[Shot]:
    """Names in paths that want to be somewhere else, and headers that want to be in logs."""
    names = ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "a%0d%0aX:%20y", "%ff%fe",
             "%ed%a0%80", "a" * 5000, "%F0%9F%98%80", "a/b", "//", ";", "a?b", "%", "%zz",
             "'", "*", "~", "a@1",
             "loreft%401", "-", ".hidden", "CON", "a%20b", "a%2fb%2f..%2fc", "tiny"]  # fmt: skip
    for name in names:
        for method in ("GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "BREW", "HEAD"):
            path = f"/admin/adapters/{name}"
            body = b"" if method in ("GET", "HEAD") else b"x" * 10
            if (method, name) == ("DELETE", "tiny"):
                continue
            yield Shot(f"{method} {path[:40]}", request(method, path, body, key=ADMIN_KEY))
        yield Shot(f"GET /v1/models/{name[:20]}", request("GET", f"/v1/models/{name}"))
        yield Shot(f"after={name[:20]}", request("GET", f"/v1/models?after={name}&limit={name}"))
    for value in (b"a" * 200, b"\xff\xfe", b"<script>", b"a\tb", b"${x}"):
        yield Shot("a request id", request("GET", "/healthz", b"", b"X-Request-Id: " + value))
        yield Shot("accept", request("GET", "/metrics", b"", b"Accept: " + value))
    for key in ("", "wrong", "é", "a" * 10_000, API_KEY[:-1], API_KEY + "x"):
        for path in ("/v1/models", "/admin/adapters"):
            yield Shot(f"{path} with the key {key[:10]!r}", request("GET", path, key=key))


def _random_bodies(seed: int, count: int) -> Iterator[Shot]:
    """Good bodies with a few bytes changed."""
    draw = random.Random(seed)
    goods = [
        b'{"model": "loreft", "prompt": ["a", "b"], "max_tokens": 2, "logprobs": 2, "echo": true}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}',
        b'{"model": "tiny", "input": ["a", "b"], "labels": ["yes", "no"]}',
        b'{"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "stream": true, "n": 2, '
        b'"stream_options": {"include_usage": true}, "logit_bias": {"5": 1.5}, "stop": ["a"]}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": 2, "reft": {"models": ["lora", '
        b'{"model": "red", "strength": 0.5}], "stack": [{"model": "direft"}]}}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": 4, "guided_json": {"type": "object", '
        b'"properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]}}',
    ]
    changes: list[Callable[[bytearray], None]] = [
        lambda found: found.__setitem__(draw.randrange(len(found)), draw.randrange(256)),
        lambda found: found.__delitem__(draw.randrange(len(found))),
        lambda found: found.insert(draw.randrange(len(found)), draw.choice(b'"{}[],:0-1.eE\\u \0')),
        lambda found: found.extend(found[: draw.randrange(40)]),
    ]
    for i in range(count):
        kind = draw.randrange(len(goods))
        found = bytearray(goods[kind])
        for _ in range(draw.randint(1, 3)):
            draw.choice(changes)(found)
        path = {1: _POSTS[1], 2: _POSTS[2]}.get(kind, _POSTS[0])
        yield Shot(f"random body {seed}:{i}", _post(bytes(found), path))


# What comes back --------------------------------------------------------------------------------


def _shoot(url: str, shot: Shot) -> tuple[str, bool]:
    """What is wrong with the answer, if anything, and whether the server failed."""
    where = urlsplit(url)
    assert where.hostname is not None
    with socket.create_connection((where.hostname, where.port or 80), _TIMEOUT_S) as connection:
        try:
            connection.sendall(shot.data)
            if shot.stops_sending:
                return "", False
            raw = _read(connection)
        except TimeoutError:
            return f"no end of the answer within {_TIMEOUT_S} s", True
        except (ConnectionResetError, BrokenPipeError):
            raw = b""
    if not raw:
        return ("", False) if shot.may_close else ("closed without an answer", True)
    return _judge(raw, shot)


def _read(connection: socket.socket) -> bytes:
    """All until the server closes, or has said all that it announced."""
    found = b""
    while len(found) < _CAP_BYTES and (piece := connection.recv(65536)):
        found += piece
        head, end, body = found.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if end and length and len(body) >= int(length[1]):
            break
    return found


def _judge(raw: bytes, shot: Shot) -> tuple[str, bool]:
    """Whether an answer is one: a status below 500, and an error in OpenAI's form."""
    head, _, body = raw.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if not head.startswith(b"HTTP/1.") or len(words) < 2 or not words[1].isdigit():
        return f"no HTTP: {raw[:80]!r}", True
    status = int(words[1])
    if status >= 500:
        return f"status {status}: {body[:300]!r}", True
    is_ours = b"x-request-id" in head.lower()
    if length := _LENGTH.search(head):
        body = body[: int(length[1])]  # what follows answers the rest of the bytes
    if status < 400 or not is_ours or shot.data.startswith(b"HEAD"):
        return "", False  # what uvicorn refuses by itself is no JSON
    try:
        error = json.loads(body)["error"]
        good = set(error) == {"message", "type", "param", "code"} and error["message"]
    except (ValueError, KeyError, TypeError):
        good = False
    return ("", False) if good else (f"status {status} in another form: {body[:200]!r}", False)

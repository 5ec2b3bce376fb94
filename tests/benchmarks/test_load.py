"""The load itself, short; and that it would notice."""

from __future__ import annotations

import json

import pytest

from benchmarks.load.crowd import Crowd
from benchmarks.load.run import Options, run
from benchmarks.load.wire import Reader, post_bytes
from benchmarks.soak.world import TINY


def test_seconds_of_a_crowd_lose_nothing() -> None:
    """As ``make load`` does for ten minutes, without the comparison."""
    options = Options(
        model=TINY, seconds=20, connections=200, streams=24, repeats=0, num_files=4, num_prompts=3
    )
    summary = run(options)
    for problem in ("lost", "wrong_adapter"):
        assert summary[problem] == 0, summary
    assert summary["leaks"] == [], summary
    for end in ("answered", "refused", "left"):
        assert summary[end] > 0, summary


# What it would notice -----------------------------------------------------------------------

QUESTION = {"digest": "d", "text": "ab", "finish_reason": "length"}


def answer(events: list[object], adapter: str = "d", status: int = 200) -> bytes:
    body = b"".join(
        b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n"
        for e in events
    )
    head = f"HTTP/1.1 {status} OK\r\nx-reft-adapter: {adapter}\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]))
    return head.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def piece(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"text": text, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (answer([piece("a"), piece("b", "length"), b"[DONE]"]), "answered"),
        (answer([piece("a"), piece("c", "length"), b"[DONE]"]), "wrong_adapter"),
        (answer([piece("ab", "length"), b"[DONE]"], adapter="e"), "wrong_adapter"),
        (answer([piece("ab", "stop"), b"[DONE]"]), "wrong_adapter"),
        (answer([piece("a"), piece("b", "length")]), "lost"),
        (answer([piece("a"), {"error": {"code": "x"}}]), "lost"),
        (answer([piece("ab", "length"), b"[DONE]"], status=500), "lost"),
        (None, "lost"),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_the_crowd_knows_right_from_wrong(data: bytes | None, end: str, step: int) -> None:
    crowd = Crowd("", 0, 0, 0, 0, [], 0)
    response = None
    if data is not None:
        reader = Reader()
        wholes = [reader.feed(data[at : at + step]) for at in range(0, len(data), step)]
        assert wholes == [False] * (len(wholes) - 1) + [True]
        response = reader.response()
    crowd._judge(QUESTION, response)
    assert dict(crowd.ends) == {end: 1}
    assert bool(crowd.problems) == (end != "answered")


def test_answers_with_a_length() -> None:
    reader = Reader()
    assert not reader.feed(b'HTTP/1.1 400 Bad\r\nContent-Length: 24\r\n\r\n{"error":')
    assert reader.feed(b'{"code": "no"}}')
    assert (reader.response().status, reader.response().error_code) == (400, "no")


def test_requests_as_bytes() -> None:
    head, _, body = post_bytes("/x", {"a": 1}).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /x HTTP/1.1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == {"a": 1}

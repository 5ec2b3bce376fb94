"""The small parts by themselves: events, disconnects, log lines."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
import structlog
from pydantic import BaseModel

from reft_core.errors import RequestFailed
from server.http.disconnect import ClientGone, unless_gone
from server.http.sse import EventStream, frames
from server.observability.logs import configure_logging


class Chunk(BaseModel):
    text: str
    note: str | None = None


async def collect(chunks) -> list[bytes]:
    return [event async for event in frames(chunks)]


def test_frames_end_with_done():
    async def chunks():
        yield Chunk(text="line\nbreak")
        yield Chunk(text="ü", note=None)

    assert asyncio.run(collect(chunks())) == [
        b'data: {"text":"line\\nbreak"}\n\n',
        'data: {"text":"ü","note":null}\n\n'.encode(),
        b"data: [DONE]\n\n",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [(RequestFailed("broken"), "request_failed"), (KeyError("k"), "internal_error")],
)
def test_frames_end_with_an_error_instead(error, code):
    async def chunks():
        yield Chunk(text="a")
        raise error

    first, last = asyncio.run(collect(chunks()))
    assert first == b'data: {"text":"a"}\n\n'
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == code


async def never():
    await asyncio.Event().wait()


def test_work_is_cancelled_when_the_client_goes():
    cleaned = []

    async def work():
        try:
            await never()
        finally:
            cleaned.append(True)

    async def receive():
        return {"type": "http.disconnect"}

    async def scenario():
        with pytest.raises(ClientGone):
            await unless_gone(receive, work())
        assert cleaned == [True]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_work_that_ends_first_gives_its_result_or_error():
    async def fine():
        return 5

    async def bad():
        raise KeyError("x")

    async def scenario():
        assert await unless_gone(never, fine()) == 5
        with pytest.raises(KeyError):
            await unless_gone(never, bad())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_work_ends_when_the_server_cancels_the_request():
    cleaned = []

    async def work():
        try:
            await never()
        finally:
            cleaned.append(True)

    async def scenario():
        outer = asyncio.create_task(unless_gone(never, work()))
        await asyncio.sleep(0.01)
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        assert cleaned == [True]

    asyncio.run(scenario())


@pytest.mark.parametrize("spec_version", ["2.0", "2.4"])
@pytest.mark.parametrize("broken_pipe", [False, True])
def test_a_stream_runs_its_end_whatever_the_server_tells_it(spec_version, broken_pipe):
    ends = []

    async def events():
        yield b"data: 1\n\n"
        await never()

    async def receive():
        if broken_pipe:
            await never()
        return {"type": "http.disconnect"}

    async def send(message):
        if broken_pipe and message.get("body"):
            raise OSError("gone")

    async def scenario():
        response = EventStream(events(), lambda: ends.append(True), {"x-test": "1"})
        scope = {"type": "http", "asgi": {"spec_version": spec_version}}
        await asyncio.wait_for(response(scope, receive, send), 5)

    asyncio.run(scenario())
    assert ends == [True]


@pytest.fixture
def _restore_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configuration = structlog.get_config()
    yield
    root.handlers[:], root.level = handlers, level
    structlog.configure(**configuration)


@pytest.mark.usefixtures("_restore_logging")
def test_every_log_line_is_one_json_object(capsys):
    configure_logging("info", "json")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("ours").info("hello\nthere", value=3)
        logging.getLogger("theirs").warning("number %d", 5)
    logging.getLogger("theirs").debug("not shown")
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("ours").exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["hello\nthere", "number 5", "failed"]
    assert [line.get("request_id") for line in lines] == ["r1", "r1", None]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert "ValueError: broken" in lines[2]["exception"]


@pytest.mark.usefixtures("_restore_logging")
def test_console_logs_are_readable(capsys):
    configure_logging("warning", "console")
    structlog.get_logger("ours").warning("disk is full", folder="data")
    structlog.get_logger("ours").info("not shown")
    shown = capsys.readouterr().err
    assert "disk is full" in shown
    assert "not shown" not in shown

"""A real process's log: every line is a record, and no record has a prompt or a key."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.server.fakes import MODEL, make_tiny_model, make_tokenizer, wait_until

API_KEY, ADMIN_KEY = "canary-api-key-1", "canary-admin-key-of-16"
CANARY = "canary-prompt-words"
TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {
    "authorization": f"Bearer {API_KEY}",
    "x-request-id": "asked-by-me",
    "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
}
# Runs the command with a library that warns and a thread that dies, and breaks what a canary asks.
PROGRAM = """
import logging, sys, threading, warnings
from server.cli.main import app
from reft_core.engine.runner import ModelRunner
from server.answering.generator import Generator

real_prefill, real_start = ModelRunner.prefill, Generator.start

def prefill(self, chunks):
    if any(chunk.sequence.request.params.seed == 13 for chunk in chunks):
        raise RuntimeError("the prefill is broken")
    return real_prefill(self, chunks)

async def start(self, job):
    if job.params.seed == 14:
        warnings.warn("a library warns")
        thread = threading.Thread(target=lambda: 1 / 0, name="helper")
        thread.start()
        thread.join()
        raise KeyError("the server is broken")
    return await real_start(self, job)

ModelRunner.prefill, Generator.start = prefill, start
app(sys.argv[1:])
"""


class Process:
    """A server over a tiny model, with its log."""

    def __init__(self, folder: Path, *args: str, program: str = PROGRAM, **settings: str) -> None:
        make_tiny_model().save_pretrained(folder / "tiny")
        make_tokenizer().save_pretrained(folder / "tiny")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("REFT_")}
        environment |= {
            "REFT_API_KEY": API_KEY,
            "REFT_ADMIN_KEY": ADMIN_KEY,
            "REFT_LOG_FORMAT": "json",
            "REFT_DATA_DIR": str(folder / "data"),
            **{f"REFT_{name.upper()}": value for name, value in settings.items()},
        }
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "serve", "--model", str(folder / "tiny"), *args],
                stdout=log,
                stderr=log,
                env=environment,
            )
        wait_until(
            lambda: self.process.poll() is not None or '"listening"' in self.log.read_text(),
            "the server to listen",
            timeout_s=60,
        )
        found = re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())
        assert found, self.log.read_text()
        self.url = found[0]

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict]:
    """The log of one process, after successes, refusals and crashes."""
    server = Process(tmp_path_factory.mktemp("logs"), "--port", "0", log_level="debug")
    ask = {"model": "tiny", "prompt": CANARY, "max_tokens": 4, "stop": ["canary stop"]}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}
    try:
        with httpx.Client(base_url=server.url, headers=HEADERS, timeout=30) as http:

            def post(path: str, status: int, body: object, **headers: str) -> None:
                kind = "content" if isinstance(body, bytes) else "json"
                sent = http.post(path, headers=headers, **{kind: body})
                assert sent.status_code == status, sent.text

            completions = "/v1/completions"
            post(completions, 200, ask)
            post(completions, 200, ask | {"stream": True})
            post("/v1/chat/completions", 200, chat)
            post("/v1/classify", 200, {"model": "tiny", "input": CANARY, "labels": ["a", CANARY]})
            post(completions, 400, ask | {"temperature": CANARY})
            post(completions, 400, ask | {CANARY: 1})
            post(completions, 400, ask | {"prompt": CANARY * 100})
            post(completions, 404, ask | {"model": CANARY})
            json_type = {"content-type": "application/json"}
            post(completions, 400, b'{"prompt": "' + CANARY.encode(), **json_type)
            post(completions, 401, ask, authorization="Bearer canary-of-somebody-else")
            post(f"/{CANARY}", 404, ask)
            post(f"{completions}?key={API_KEY}", 200, ask)
            post(f"/admin/adapters/{CANARY}", 400, b"canary", authorization=f"Bearer {ADMIN_KEY}")
            post(completions, 500, ask | {"seed": 13})
            post(completions, 500, ask | {"seed": 13, "stream": True})
            post(completions, 500, ask | {"seed": 14})
            post(completions, 404, ask | {"model": "tiny@sha256:" + "0" * 20})
        with pytest.raises(httpx.HTTPError):  # an HTTP request that uvicorn itself refuses
            httpx.get(server.url, headers={"canary header": "x"}, timeout=5).raise_for_status()
        status = server.end()
    finally:
        server.process.kill()
        server.process.wait()
    assert status == 0
    return server.records()


def test_every_line_is_a_record_with_the_same_keys(told):
    assert len(told) > 20
    for record in told:
        assert isinstance(record, dict)
        assert {"event", "level", "logger", "timestamp"} <= record.keys(), record


def test_no_prompt_and_no_key_in_any(told):
    for record in told:
        assert "canary" not in json.dumps(record).lower(), record


def test_the_line_of_a_request(told):
    lines = [record for record in told if record["event"] == "request"]
    whole = lines[0]
    assert whole["route"] == "/v1/completions"
    assert (whole["method"], whole["status"]) == ("POST", 200)
    assert (whole["request_id"], whole["trace_id"]) == ("asked-by-me", TRACE)
    assert whole["span_id"] == "b7ad6b7169203331"
    assert (whole["model"], whole["adapter"], whole["edits"]) == ("tiny", "base", 0)
    assert whole["prompt_tokens"] == len(CANARY)
    assert 0 < whole["completion_tokens"] <= 4
    assert whole["finish_reason"] in ("length", "stop")
    assert whole["seconds"] > 0
    assert "error" not in whole
    stream = lines[1]
    assert stream["completion_tokens"] == whole["completion_tokens"]
    assert stream["cached_tokens"] == len(CANARY) - 1
    assert [line["status"] for line in lines].count(500) == 3
    assert {line.get("error") for line in lines} >= {"RequestFailed", "KeyError", "PromptTooLong"}


def test_crashes_are_told_with_their_request_and_where(told):
    (crash,) = [record for record in told if record["event"] == "unexpected error"]
    assert crash["request_id"] == "asked-by-me"
    assert "the server is broken" in crash["exception"]
    (prefill, _) = [record for record in told if "prefill of" in record["event"]]
    assert "in prefill" in prefill["exception"]


def test_warnings_dying_threads_and_the_http_server_write_records_too(told):
    (warning,) = [record for record in told if "a library warns" in record["event"]]
    assert (warning["logger"], warning["level"]) == ("py.warnings", "warning")
    (thread,) = [record for record in told if record["event"] == "thread helper ends"]
    assert "ZeroDivisionError" in thread["exception"]
    loggers = {record["logger"] for record in told}
    assert "uvicorn.error" in loggers
    events = [record["event"] for record in told]
    assert events.index("draining") < events.index("engine stopped")


def test_a_signal_in_the_middle_of_a_stream(tmp_path):
    """New requests are refused at once, the stream is finished, and the process exits with 0."""
    plain = "import sys; from server.cli.main import app; app(sys.argv[1:])"
    server = Process(tmp_path, "--port", "0", program=plain, drain_timeout_s="30")
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 400, "n": 8, "ignore_eos": True}
    try:
        with httpx.Client(base_url=server.url, headers=HEADERS, timeout=30) as http:
            request = {"json": body | {"stream": True}}
            with http.stream("POST", "/v1/completions", **request) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                refused = _refusal(server.url)
                rest = [line for line in lines if line]
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
        assert rest[-1] == "data: [DONE]"
        ends = [line for line in rest if '"finish_reason":"length"' in line]
        assert len(ends) == 8
        assert server.process.wait(30) == 0
    finally:
        server.process.kill()
        server.process.wait()
    assert all(isinstance(record, dict) for record in server.records())


def _refusal(url: str) -> httpx.Response:
    """The first answer that is a refusal; the signal may take a moment to arrive."""
    for _ in range(200):
        ask = {"model": MODEL.name, "prompt": "hi", "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/completions", json=ask, headers=HEADERS, timeout=10)
        if answer.status_code == 503:
            return answer
        time.sleep(0.01)
    raise AssertionError("never refused")


def test_a_file_gets_no_colours():
    program = (
        "import structlog; from server.observability.logs import configure_logging as configure; "
        "configure('info', 'console'); structlog.get_logger('x').info('told', name='tone')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert b"told" in done.stderr
    assert b"name=tone" in done.stderr
    assert b"\x1b" not in done.stderr

"""Traces and gen_ai metrics, as a collector gets them from the real exporter."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from reft_core.errors import RequestFailed
from tests.server.fakes import MODEL, make_adapter
from tests.server.observability.otlp_collector import attributes, collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CANARY = "canary prompt text"
ASK = {"model": "tone", "prompt": CANARY, "max_tokens": 4, "temperature": 0.5, "seed": 7}


@pytest.fixture
def traced(in_process):
    """Runs ``act`` on a server with an adapter, to its end, and returns what was collected."""

    def run(act, **changes):
        with collecting() as collector:
            with in_process(otlp_endpoint=collector.url, **changes) as server:
                digest = server.upload("tone", make_adapter(1))["digest"]
                act(server)
            return collector, digest

    return run


def test_a_request_is_a_span_with_its_stages(traced):
    def act(server):
        for path in ("/healthz", "/metrics"):
            server.http.get(path)
        assert server.http.post("/v1/completions", json=ASK | {"n": 2}).status_code == 200

    before = time.time_ns()
    collector, digest = traced(act)
    span = collector.span("text_completion tone")
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert before < span.start_time_unix_nano <= span.end_time_unix_nano < time.time_ns()
    found = attributes(span)
    assert found.pop("gen_ai.response.id").startswith("cmpl-")
    reference = found.pop("gen_ai.response.model")
    assert reference == f"tone@sha256:{digest[:12]}"
    assert found == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "reft-serve",
        "gen_ai.request.model": "tone",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": len(CANARY),
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "reft.adapters": [reference],
        "reft.adapter.digests": [digest],
        "reft.edits": 2 * 2 * 2,
    }
    children = collector.children(span)
    names = [child.name for child in children]
    assert names == ["resolve", "load adapters", *["queue", "prefill", "decode"] * 2]
    for child in children:
        assert child.trace_id == span.trace_id
        assert child.start_time_unix_nano <= child.end_time_unix_nano
    choices = [attributes(child).get("reft.choice") for child in children]
    assert choices == [None, None, 0, 0, 0, 1, 1, 1]
    assert collector.resources[0]["service.name"] == "reft-serve"
    assert {s.name for s in collector.spans if not s.parent_span_id} == {
        "text_completion tone",
        "POST /admin/adapters/{name}",
    }


def test_a_stream_ended_by_a_stop_string_has_its_stages_too(traced, engine):
    engine.reply = lambda _: "abcdef"

    def act(server):
        body = {
            "model": MODEL.name,
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "stop": "d",
        }
        assert "[DONE]" in server.http.post("/v1/chat/completions", json=body).text

    collector, _ = traced(act)
    span = collector.span(f"chat {MODEL.name}")
    found = attributes(span)
    assert found["gen_ai.request.stream"] is True
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert found["gen_ai.response.time_to_first_chunk"] > 0
    assert "reft.adapters" not in found
    assert [child.name for child in collector.children(span)][-2:] == ["prefill", "decode"]


def test_the_callers_trace_goes_on(traced):
    header = {"traceparent": f"00-{TRACE}-{PARENT}-01"}

    def act(server):
        server.http.post("/v1/completions", json=ASK, headers=header)
        off = {"traceparent": f"00-{'1' * 32}-{PARENT}-00"}
        server.http.post("/v1/completions", json=ASK, headers=off)
        bad = {"traceparent": f"00-{'2' * 32}-{PARENT}"}
        server.http.post("/v1/completions", json=ASK, headers=bad)

    collector, _ = traced(act)
    spans = [span for span in collector.spans if span.name == "text_completion tone"]
    assert len(spans) == 2, "what the caller does not sample is not sampled"
    assert spans[0].trace_id.hex() == TRACE
    assert spans[0].parent_span_id.hex() == PARENT
    assert spans[1].trace_id.hex() != "2" * 32
    assert not spans[1].parent_span_id


def test_errors_are_named(traced, engine):
    engine.fail_after, engine.failure = 1, RequestFailed("decode failed")

    def act(server):
        server.http.post("/v1/completions", json=ASK)
        server.http.post("/v1/completions", json=ASK | {"model": "unknown-name"})
        server.http.post("/v1/completions", json=ASK | {"stream": True})
        engine.refuse_with = ZeroDivisionError("broken")
        server.http.post("/v1/completions", json=ASK)

    collector, _ = traced(act)
    spans = [span for span in collector.spans if not span.parent_span_id][1:]
    assert [attributes(span)["error.type"] for span in spans] == [
        *("RequestFailed", "AdapterNotFound", "RequestFailed", "ZeroDivisionError")
    ]
    assert all(span.status.code == Status.STATUS_CODE_ERROR for span in spans)
    assert [attributes(s)["http.response.status_code"] for s in spans] == [500, 404, 200, 500]
    assert not any("unknown-name" in span.name for span in spans)


def test_gen_ai_metrics(traced):
    def act(server):
        for _ in range(3):
            server.http.post("/v1/completions", json=ASK)
        server.http.post("/v1/completions", json=ASK | {"model": MODEL.name})
        server.http.post("/v1/completions", json=ASK | {"max_tokens": 10_000})

    collector, _ = traced(act)
    shared = {"gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "reft-serve"}
    tone = shared | {"gen_ai.request.model": "tone"}
    base = shared | {"gen_ai.request.model": "(base)"}
    failed = tone | {"error.type": "PromptTooLong"}
    durations = collector.points("gen_ai.server.request.duration")
    assert [(where, point.count) for where, point in durations] == [
        (tone, 3),
        (base, 1),
        (failed, 1),
    ]
    assert list(durations[0][1].explicit_bounds[:3]) == [0.01, 0.02, 0.04]
    for name in ("time_to_first_token", "time_per_output_token"):
        points = collector.points(f"gen_ai.server.{name}")
        assert [(where, point.count) for where, point in points] == [(tone, 3), (base, 1)]
        assert all(point.sum > 0 for _, point in points)
    usage = {
        (where["gen_ai.request.model"], where["gen_ai.token.type"]): point.sum
        for where, point in collector.points("gen_ai.client.token.usage")
    }
    assert usage["(base)", "input"] == len(CANARY)
    assert usage["tone", "output"] == 3 * 4


def test_no_prompt_and_no_key_is_sent(traced):
    key = "canary-key-of-a-user"

    def act(server):
        headers = {"authorization": f"Bearer {key}"}
        ask = ASK | {"stop": ["canary stop"]}
        assert server.http.post("/v1/completions", json=ask, headers=headers).status_code == 200

    collector, _ = traced(act, api_key=key)
    sent = b"".join(collector.raw)
    assert b"gen_ai" in sent
    assert b"canary" not in sent


def test_classifying_is_traced(traced):
    def act(server):
        body = {"model": "tone", "input": "x", "labels": ["a", "b"]}
        assert server.http.post("/v1/classify", json=body).status_code == 200

    collector, digest = traced(act)
    found = attributes(collector.span("classify tone"))
    assert found["reft.adapter.digests"] == [digest]
    assert found["gen_ai.usage.input_tokens"] > 0


def test_a_collector_that_is_not_there_disturbs_nobody(in_process, caplog):
    with in_process(otlp_endpoint="http://127.0.0.1:1") as server:
        ask = ASK | {"model": MODEL.name}
        assert server.http.post("/v1/completions", json=ask).status_code == 200

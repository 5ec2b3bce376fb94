"""``traceparent``: which are honoured, and that they reach the logs without any exporter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import structlog
from starlette.datastructures import Headers

from reft_core.errors import UnsupportedFeature
from server.observability.record import current_record, open_record
from server.observability.tracing.context import TraceContext, parse_traceparent
from server.observability.tracing.telemetry import NoTelemetry, telemetry_for
from tests.server.fakes import MODEL

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (GOOD, TraceContext(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", TraceContext(TRACE, SPAN, False)),
        (f"00-{TRACE}-{SPAN}-03", TraceContext(TRACE, SPAN, True)),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", TraceContext(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE}-{SPAN}-01\n", TraceContext(TRACE, SPAN, True)),
        ("", None),
        ("<script>", None),
    ],
)
def test_the_form(value, expected):
    assert parse_traceparent([value]) == expected


def test_two_headers_are_as_good_as_none():
    assert parse_traceparent([GOOD, GOOD]) is None
    assert parse_traceparent([]) is None


def test_nobody_listens_by_default_and_nothing_is_imported():
    code = (
        "import sys, server.app; from server.observability.tracing.telemetry import telemetry_for; "
        # transformers imports the API where it is installed; that does nothing by itself
        "telemetry_for(None); parts = 'opentelemetry.sdk', 'opentelemetry.exporter', "
        "'server.observability.tracing.otlp'; "
        "print([m for m in sys.modules if m.startswith(parts)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_endpoint_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "server.observability.tracing.otlp", None)
    with pytest.raises(UnsupportedFeature, match=r"reft-serve\[otel\]"):
        telemetry_for("http://localhost:4318")


def test_the_ids_are_the_callers():
    span = NoTelemetry().begin(Headers({"traceparent": GOOD}))
    assert span.log_fields == {"trace_id": TRACE, "span_id": SPAN}
    assert NoTelemetry().begin(Headers({"traceparent": "x"})).log_fields == {}


def test_they_are_in_every_log_record_of_the_request(server, engine):
    engine.refuse_with = ZeroDivisionError("broken")
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as records:
        server.http.post(
            "/v1/completions",
            json={"model": MODEL.name, "prompt": "hi"},
            headers={"traceparent": GOOD, "x-request-id": "r-1"},
        )
    assert [record["event"] for record in records] == ["unexpected error", "request"]
    for record in records:
        assert (record["trace_id"], record["span_id"]) == (TRACE, SPAN)
        assert record["request_id"] == "r-1"
    assert records[1]["error"] == "ZeroDivisionError"


def test_records_are_apart(server):
    outside = current_record()
    outside.model = "nobody's"
    assert current_record().model is None
    mine = open_record()
    assert current_record() is mine
    json.dumps(mine.for_log())

"""Requests as OpenTelemetry spans and metrics, sent over OTLP/HTTP. Needs the extra ``otel``.

Names and attributes follow the semantic conventions for generative AI. A span is begun with its
request, so that logs can name it; all else is read from the record at the end, so that nothing
here runs while tokens are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from reft_core import __version__
from server.observability.record import ChoiceRecord, RequestRecord
from server.observability.tracing.attributes import operation_of, request_attributes
from server.observability.tracing.context import HEADER, parse_traceparent
from server.observability.tracing.metrics import GenAiMetrics
from server.observability.tracing.telemetry import Ended

log = structlog.get_logger(__name__)

_EXPORT_TIMEOUT_S = 5
"""For one attempt to send; what a dead collector may add to the end of the process."""
_METRICS_EVERY_MS = 15_000
_MOST_CHOICES = 16
"""Choices of one request whose stages become spans."""
_FAILED = 500


class OtlpTelemetry:
    """Reports to the collector at ``endpoint``, such as ``http://localhost:4318``."""

    def __init__(self, endpoint: str) -> None:
        base = endpoint.rstrip("/")
        resource = Resource.create({"service.name": "reft-serve", "service.version": __version__})
        spans = OTLPSpanExporter(f"{base}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
        self._spans = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._spans.add_span_processor(BatchSpanProcessor(spans))
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(f"{base}/v1/metrics", timeout=_EXPORT_TIMEOUT_S),
            export_interval_millis=_METRICS_EVERY_MS,
        )
        self._meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._tracer = self._spans.get_tracer("reft-serve", __version__)
        self._metrics = GenAiMetrics(self._meters.get_meter("reft-serve", __version__))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Headers) -> OtlpSpan:
        """See :meth:`Telemetry.begin`. A caller that does not sample is not sampled here."""
        parent = None
        if parse_traceparent(headers.getlist(HEADER)) is not None:
            parent = self._propagator.extract(dict(headers))
        span = self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER)
        return OtlpSpan(self._tracer, span, self._metrics)

    def close(self) -> None:
        """See :meth:`Telemetry.close`."""
        self._spans.shutdown()
        self._meters.shutdown(timeout_millis=1000 * _EXPORT_TIMEOUT_S)


class OtlpSpan:
    """A request that has begun."""

    def __init__(self, tracer: Tracer, span: Span, metrics: GenAiMetrics) -> None:
        self._tracer = tracer
        self._span = span
        self._metrics = metrics

    @property
    def log_fields(self) -> dict[str, str]:
        """The ids of the request's own span."""
        context = self._span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def end(self, ended: Ended, record: RequestRecord) -> None:
        """Report the request."""
        try:
            self._end(ended, record)
        except Exception:
            log.exception("a request could not be reported")

    def _end(self, ended: Ended, record: RequestRecord) -> None:
        operation = operation_of(ended.route)
        if operation is not None and record.model is not None:
            self._span.update_name(f"{operation} {record.model}")
            self._metrics.record(operation, ended, record)
        else:
            self._span.update_name(f"{ended.method} {ended.route}")
        if self._span.is_recording():
            self._span.set_attributes(request_attributes(operation, ended, record))
            if record.error is not None or ended.status >= _FAILED:
                self._span.set_status(StatusCode.ERROR)
            self._add_stages(record)
        self._span.end()

    def _add_stages(self, record: RequestRecord) -> None:
        """A child for each stage that is known."""
        on_clock = _clock()
        context = set_span_in_context(self._span)

        def add(name: str, begin: float, end: float, **attributes: int) -> None:
            child = self._tracer.start_span(
                name, context, start_time=on_clock(begin), attributes=attributes
            )
            child.end(on_clock(max(begin, end)))

        if record.resolved is not None:
            add("resolve", *record.resolved)
        if record.held is not None:
            add("load adapters", *record.held)
        for index, choice in enumerate(record.choices[:_MOST_CHOICES]):
            for name, begin, end in _stages(choice):
                add(name, begin, end, **{"reft.choice": index})


def _stages(choice: ChoiceRecord) -> list[tuple[str, float, float]]:
    """Name, begin and end of what a choice went through. Where the engine's own times are not
    known, its wait for a slot is part of its prefill."""
    ended_at = choice.ended_at or choice.last_token_at
    if ended_at is None:
        return []
    if (timings := choice.timings) is not None:
        queued_at = ended_at - timings.decode_s - timings.prefill_s - timings.queue_s
        admitted_at = queued_at + timings.queue_s
        first_at = admitted_at + timings.prefill_s
        return [
            ("queue", queued_at, admitted_at),
            ("prefill", admitted_at, first_at),
            ("decode", first_at, ended_at),
        ]
    if choice.first_token_at is None:
        return [("queue", choice.submitted_at, ended_at)]
    return [
        ("prefill", choice.submitted_at, choice.first_token_at),
        ("decode", choice.first_token_at, ended_at),
    ]


def _clock() -> Callable[[float], int]:
    """Turns times of ``time.perf_counter`` into nanoseconds since 1970."""
    now_ns, now = time.time_ns(), time.perf_counter()
    return lambda moment: now_ns - int((now - moment) * 1e9)

"""The interface to whoever wants to know of each request, and the one that nobody listens to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers

from server.observability.record import RequestRecord
from server.observability.tracing.context import HEADER, parse_traceparent


@dataclass(frozen=True)
class Ended:
    """How an HTTP request ended."""

    method: str
    route: str
    """The template, not the path."""
    status: int
    began_at: float
    """Of ``time.perf_counter``, as all times in the record."""
    ended_at: float
    adapter: str
    """A name for metrics, of which there are only so many."""


class OpenSpan(Protocol):
    """A request that has begun."""

    @property
    def log_fields(self) -> dict[str, str]:
        """What every log record of the request is to carry: trace_id and span_id, or nothing."""

    def end(self, ended: Ended, record: RequestRecord) -> None:
        """Report the request. Must not raise."""


class Telemetry(Protocol):
    """Somebody to report requests to."""

    def begin(self, headers: Headers) -> OpenSpan:
        """A request with these headers has begun."""

    def close(self) -> None:
        """Send what has not been sent, for some seconds at most. Blocks."""


@dataclass(frozen=True)
class _Unreported:
    """A request that is reported to nobody."""

    log_fields: dict[str, str]

    def end(self, ended: Ended, record: RequestRecord) -> None:
        """Nothing."""


class NoTelemetry:
    """Nobody. Logs still carry the ids that a caller gave, the span's being the caller's own."""

    def begin(self, headers: Headers) -> OpenSpan:
        """See :meth:`Telemetry.begin`."""
        found = parse_traceparent(headers.getlist(HEADER))
        if found is None:
            return _Unreported({})
        return _Unreported({"trace_id": found.trace_id, "span_id": found.span_id})

    def close(self) -> None:
        """Nothing."""


def telemetry_for(endpoint: str | None) -> Telemetry:
    """Who listens at an OTLP endpoint; nobody if it is None, and then nothing is imported.

    Raises :class:`UnsupportedFeature` if OpenTelemetry is not installed.
    """
    if endpoint is None:
        return NoTelemetry()
    from reft_core.errors import UnsupportedFeature

    try:
        from server.observability.tracing.otlp import OtlpTelemetry
    except ImportError as error:
        raise UnsupportedFeature(
            f"otlp_endpoint: got {endpoint!r}, but OpenTelemetry is not installed; "
            "pip install 'reft-serve[otel]'",
            field="otlp_endpoint",
        ) from error
    return OtlpTelemetry(endpoint)

"""The metrics of the semantic conventions for generative AI, one record a request or choice."""

from __future__ import annotations

from opentelemetry.metrics import Histogram, Meter

from server.observability.record import RequestRecord
from server.observability.tracing.attributes import PROVIDER
from server.observability.tracing.telemetry import Ended

# The conventions' own boundaries.
_DURATIONS = [0.01 * 2**i for i in range(14)]
_FIRST = [
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
]
_PACES = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
_TOKENS = [float(4**i) for i in range(14)]


class GenAiMetrics:
    """The instruments."""

    def __init__(self, meter: Meter) -> None:
        def seconds(name: str, what: str, boundaries: list[float]) -> Histogram:
            return meter.create_histogram(
                name, "s", what, explicit_bucket_boundaries_advisory=boundaries
            )

        self._duration = seconds(
            "gen_ai.server.request.duration", "From a request's arrival to its end", _DURATIONS
        )
        self._first_token = seconds(
            "gen_ai.server.time_to_first_token", "From arrival to the first token", _FIRST
        )
        self._pace = seconds(
            "gen_ai.server.time_per_output_token", "Between tokens after the first", _PACES
        )
        self._usage = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of a request",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    def record(self, operation: str, ended: Ended, record: RequestRecord) -> None:
        """Count one request that has ended. Adapters beyond those with a metric of their own
        share a name, as the number of time series must stay small."""
        shared = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": ended.adapter,
        }
        error = record.error or (str(ended.status) if ended.status >= 400 else None)
        failure = {} if error is None else {"error.type": error}
        self._duration.record(ended.ended_at - ended.began_at, shared | failure)
        for kind, count in (
            ("input", record.num_prompt_tokens),
            ("output", record.num_completion_tokens),
        ):
            self._usage.record(count, shared | {"gen_ai.token.type": kind})
        if error is not None:
            return
        for choice in record.choices:
            if choice.first_token_at is not None:
                self._first_token.record(choice.first_token_at - ended.began_at, shared)
            if (pace := choice.time_per_token_s) is not None:
                self._pace.record(pace, shared)

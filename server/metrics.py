"""Prometheus metrics, in a registry of the server's own.

Names are vLLM's with the prefix ``reft_``, so dashboards carry over. The engine's own
counters and gauges are read when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reft_core.engine.interface import AdapterHost, EngineStats, Timings
from server.residency import Residency

_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STAGE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Everything the server measures about itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._finished = Counter(
            "reft_request_success",
            "Choices ended, by reason: stop, length, abort (client gone) or error",
            ["finished_reason"],
            registry=self.registry,
        )
        self._http = Counter(
            "reft_http_requests",
            "HTTP requests answered",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._cold_loads = Counter(
            "reft_adapter_cold_loads",
            "Adapters read from disk into the engine",
            registry=self.registry,
        )
        self._load = self._histogram(
            "adapter_load", "From wanting a cold adapter to having it in the engine", _LOAD_BUCKETS
        )
        self._first_token = self._histogram(
            "time_to_first_token", "From the request's arrival to its first token", _STAGE_BUCKETS
        )
        self._gap = self._histogram(
            "inter_token_latency", "Between two tokens of one choice", _TOKEN_BUCKETS
        )
        self._whole = self._histogram(
            "e2e_request_latency", "From the request's arrival to the choice's end", _STAGE_BUCKETS
        )
        self._queue = self._histogram(
            "request_queue_time", "From submission to admission", _STAGE_BUCKETS
        )
        self._prefill = self._histogram(
            "request_prefill_time", "From admission to the first token", _STAGE_BUCKETS
        )
        self._decode = self._histogram(
            "request_decode_time", "From the first token to the last", _STAGE_BUCKETS
        )

    def watch(self, engine: AdapterHost, residency: Residency) -> None:
        """Report the own numbers of both with every scrape."""
        self.registry.register(_Watcher(engine, residency))

    def count_http(self, method: str, route: str, status: int) -> None:
        """One HTTP request was answered; ``route`` is the template, not the path."""
        self._http.labels(method, route, str(status)).inc()

    def observe_load(self, seconds: float) -> None:
        """One adapter was read into the engine, ``seconds`` after it was first wanted."""
        self._cold_loads.inc()
        self._load.observe(seconds)

    def observe_first_token(self, seconds: float) -> None:
        """A choice's first token came after ``seconds``."""
        self._first_token.observe(seconds)

    def observe_gap(self, seconds: float) -> None:
        """A choice's next token came ``seconds`` after the one before."""
        self._gap.observe(seconds)

    def observe_end(self, reason: str, seconds: float) -> None:
        """A choice ended for ``reason``, ``seconds`` after its request arrived."""
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)

    def observe_stages(self, timings: Timings) -> None:
        """How long a choice spent in each of the engine's stages."""
        self._queue.observe(timings.queue_s)
        self._prefill.observe(timings.prefill_s)
        self._decode.observe(timings.decode_s)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        """A histogram of seconds."""
        return Histogram(f"reft_{name}_seconds", what, buckets=buckets, registry=self.registry)


class _Watcher(Collector):
    """Turns what others know of themselves into metrics at scrape time."""

    def __init__(self, engine: AdapterHost, residency: Residency) -> None:
        self._engine = engine
        self._residency = residency

    def collect(self) -> Iterator[Metric]:
        """One snapshot."""
        stats = self._engine.stats()
        for name, what, value in _gauges(stats, self._residency):
            yield GaugeMetricFamily(f"reft_{name}", what, value=value)
        for name, what, value in _counters(stats, self._residency):
            yield CounterMetricFamily(f"reft_{name}", what, value=value)


def _gauges(stats: EngineStats, residency: Residency) -> list[tuple[str, str, float]]:
    """Name, meaning and value of what goes up and down."""
    kv_share = stats.kv_tokens_used / max(1, stats.kv_tokens_capacity)
    return [
        ("num_requests_running", "Requests in the batch", stats.num_running),
        ("num_requests_waiting", "Requests waiting for a slot", stats.num_waiting),
        ("num_slots", "Requests the batch can hold", stats.num_slots),
        ("kv_cache_usage_perc", "Share of the key-value store in use, 1 is full", kv_share),
        ("prefix_cache_blocks", "Blocks in the prefix cache", stats.cached_blocks),
        ("prefix_cache_blocks_free", "Blocks it has room for", stats.free_cached_blocks),
        ("prefix_cache_blocks_max", "Blocks it has memory for", stats.max_cached_blocks),
        ("resident_adapters", "Adapters in the engine", stats.num_resident_adapters),
        (
            "adapter_resident_bytes",
            "Bytes of the adapters in the engine",
            stats.resident_adapter_bytes,
        ),
        ("decode_graphs", "CUDA graphs that decode steps replay", stats.num_decode_graphs),
        ("warm_up_seconds", "Seconds of the start that recorded them", stats.warm_up_s),
        ("adapter_budget_bytes", "Bytes that adapters may take", residency.budget_bytes),
        ("adapter_references", "Uses of adapters, pins included", residency.num_references),
        ("adapters_pinned", "Adapters that stay resident", residency.num_pinned),
        ("adapters_waiting", "Cold adapters that wait for room", residency.num_waiting),
    ]


def _counters(stats: EngineStats, residency: Residency) -> list[tuple[str, str, float]]:
    """Name, meaning and value of what only grows."""
    return [
        ("prompt_tokens", "Prompt tokens prefilled", stats.prompt_tokens_total),
        (
            "prefix_cache_hit_tokens",
            "Tokens taken from the prefix cache",
            stats.cached_tokens_total,
        ),
        ("preemptions", "Requests that lost their slot for a while", stats.preemptions_total),
        ("adapter_evictions", "Adapters that left the engine", residency.num_evictions),
        ("generation_tokens", "Tokens generated", stats.generated_tokens_total),
        ("edits_applied", "Hidden states edited by adapters", stats.edits_applied_total),
        ("prefill_steps", "Forward passes over prompts", stats.prefill_steps_total),
        ("decode_steps", "Forward passes that each made a token a row", stats.decode_steps_total),
    ]

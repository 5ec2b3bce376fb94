"""Prometheus metrics, in a registry of the server's own.

Names are vLLM's with the prefix ``reft_``, so dashboards carry over. What the engine and the
residency know of themselves is read when somebody scrapes
(:mod:`server.observability.engine_metrics`).
"""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from reft_core.engine.interface import AdapterHost, Timings
from server.adapters.residency import Residency
from server.keys.usage import Usage
from server.observability.adapter_usage import AdapterUsage
from server.observability.engine_metrics import EngineMetrics
from server.observability.exposition import Exposition

MetricsCompat = Literal["none", "vllm"]

_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STAGE_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
    *(300, 600),
)
_COUNT_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """Everything the server measures about itself."""

    def __init__(self, compat: MetricsCompat = "none", most_adapters: int = 50) -> None:
        self.adapters = AdapterUsage(most_adapters)
        """Which adapters are asked for."""
        self.tenants = Usage()
        """What each tenant uses."""
        as_vllm = compat == "vllm"
        self._own = CollectorRegistry()
        sources = (self._own, self.adapters, self.tenants.registry)
        self._expositions = [Exposition(each, as_vllm) for each in sources]
        self.registry, self.for_operators = CollectorRegistry(), CollectorRegistry()
        """What a scrape reads; the second has what names adapters and tenants."""
        self.registry.register(self._expositions[0])
        for exposition in self._expositions[1:]:
            self.for_operators.register(exposition)
        ProcessCollector(registry=self.registry)
        self._finished = Counter(
            "reft_request_success",
            "Choices ended, by reason: stop, length, abort (client gone) or error",
            ["finished_reason"],
            registry=self._own,
        )
        self._http = Counter(
            "reft_http_requests",
            "HTTP requests answered; 499 is a client that left",
            ["method", "route", "status"],
            registry=self._own,
        )
        self._cold_loads = Counter(
            "reft_adapter_cold_loads",
            "Adapters read from the store into the engine",
            registry=self._own,
        )
        self._load = self._seconds(
            "adapter_load", "From wanting a cold adapter to having it in the engine", _LOAD_BUCKETS
        )
        self._swap = self._seconds(
            "adapter_swap",
            "The same, of those for which another adapter had to leave",
            _LOAD_BUCKETS,
        )
        self._first_token = self._seconds(
            "time_to_first_token", "From the request's arrival to its first token", _STAGE_BUCKETS
        )
        self._gap = self._seconds(
            "inter_token_latency", "Between two tokens of one choice", _TOKEN_BUCKETS
        )
        self._pace = self._seconds(
            "request_time_per_output_token",
            "Mean time between the tokens of a choice",
            _TOKEN_BUCKETS,
        )
        self._whole = self._seconds(
            "e2e_request_latency", "From the request's arrival to the choice's end", _STAGE_BUCKETS
        )
        self._queue = self._seconds(
            "request_queue_time", "From submission to admission", _STAGE_BUCKETS
        )
        self._prefill = self._seconds(
            "request_prefill_time", "From admission to the first token", _STAGE_BUCKETS
        )
        self._decode = self._seconds(
            "request_decode_time", "From the first token to the last", _STAGE_BUCKETS
        )
        self._inference = self._seconds(
            "request_inference_time", "From admission to the last token", _STAGE_BUCKETS
        )
        self._prompt_tokens = self._tokens("request_prompt_tokens", "Prompt tokens of a choice")
        self._answer_tokens = self._tokens(
            "request_generation_tokens", "Tokens generated for a choice"
        )
        self._max_tokens = self._tokens(
            "request_params_max_tokens", "Most tokens that a choice was allowed"
        )
        self._ready = Gauge(
            "reft_ready", "1 while new requests are welcome, else 0", registry=self._own
        )
        self._registry_up = Gauge(
            "reft_registry_up", "1 while the registry answers, else 0", registry=self._own
        )
        for reason in _REASONS:  # so that rates of those that have not happened yet are zero
            self._finished.labels(reason)

    def watch(self, engine: AdapterHost, residency: Residency) -> None:
        """Report the own numbers of both with every scrape, and whose they are."""
        for exposition in self._expositions:
            exposition.model_name = engine.model.name
        self.adapters.num_slots = engine.stats().num_slots
        self._own.register(EngineMetrics(engine, residency))

    def set_ready(self, is_ready: bool, registry_answers: bool) -> None:
        """Whether new requests are welcome, and whether the registry answers."""
        self._ready.set(is_ready)
        self._registry_up.set(registry_answers)

    def count_http(self, method: str, route: str, status: int) -> None:
        """One HTTP request was answered; ``route`` is the template, not the path."""
        self._http.labels(method, route, str(status)).inc()

    def observe_load(self, seconds: float, swapped: bool) -> None:
        """One adapter was read into the engine, ``seconds`` after it was first wanted; if
        ``swapped``, another one had to leave."""
        self._cold_loads.inc()
        self._load.observe(seconds)
        if swapped:
            self._swap.observe(seconds)

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

    def observe_counts(self, num_prompt: int, num_generated: int, max_tokens: int) -> None:
        """How many tokens a choice that has ended had, and was allowed to have."""
        self._prompt_tokens.observe(num_prompt)
        self._answer_tokens.observe(num_generated)
        self._max_tokens.observe(max_tokens)

    def observe_pace(self, seconds: float) -> None:
        """A choice's tokens came ``seconds`` after one another, on average."""
        self._pace.observe(seconds)

    def observe_stages(self, timings: Timings) -> None:
        """How long a choice spent in each of the engine's stages."""
        self._queue.observe(timings.queue_s)
        self._prefill.observe(timings.prefill_s)
        self._decode.observe(timings.decode_s)
        self._inference.observe(timings.prefill_s + timings.decode_s)

    def _seconds(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        """A histogram of seconds."""
        return Histogram(f"reft_{name}_seconds", what, buckets=buckets, registry=self._own)

    def _tokens(self, name: str, what: str) -> Histogram:
        """A histogram of numbers of tokens."""
        return Histogram(f"reft_{name}", what, buckets=_COUNT_BUCKETS, registry=self._own)

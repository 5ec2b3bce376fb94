"""What the engine and the residency know of themselves, as metrics, whenever somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reft_core.engine.interface import AdapterHost, EngineStats
from server.adapters.residency import Residency


class EngineMetrics(Collector):
    """One engine's metrics."""

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
        yield _prompt_tokens_by_source(stats)
        yield _cache_config(stats)


def _gauges(stats: EngineStats, residency: Residency) -> list[tuple[str, str, float]]:
    """Name, meaning and value of what goes up and down."""
    kv_share = stats.kv_tokens_used / max(1, stats.kv_tokens_capacity)
    return [
        ("num_requests_running", "Requests in the batch", stats.num_running),
        ("num_requests_waiting", "Requests waiting for a slot", stats.num_waiting),
        ("num_slots", "Requests the batch can hold", stats.num_slots),
        ("kv_cache_usage_perc", "Share of the key-value store in use, 1 is full", kv_share),
        ("kv_token_bytes", "Bytes of one token's keys and values", stats.kv_token_bytes),
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
    taken, computed = stats.cached_tokens_total, stats.prompt_tokens_total
    return [
        (
            "prompt_tokens",
            "Prompt tokens that were computed or taken over; again after a preemption",
            computed + taken,
        ),
        ("prefix_cache_queries", "Tokens that were looked up for sharing", computed + taken),
        (
            "prefix_cache_hits",
            "Tokens taken from the prefix cache or from a request beside, not computed",
            taken,
        ),
        (
            "prefix_tokens_shared_across_adapters",
            "Those of the hits that a request with other adapters, or with none, had left",
            stats.foreign_tokens_total,
        ),
        (
            "kv_saved_bytes",
            "Bytes of keys and values that were copied instead of computed",
            taken * stats.kv_token_bytes,
        ),
        ("num_preemptions", "Requests that lost their slot for a while", stats.preemptions_total),
        ("adapter_evictions", "Adapters that left the engine", residency.num_evictions),
        ("generation_tokens", "Tokens generated", stats.generated_tokens_total),
        ("edits_applied", "Hidden states edited by adapters", stats.edits_applied_total),
        ("prefill_steps", "Forward passes over prompts", stats.prefill_steps_total),
        ("decode_steps", "Forward passes that each made a token a row", stats.decode_steps_total),
    ]


def _prompt_tokens_by_source(stats: EngineStats) -> Metric:
    """The prompt tokens again, taken apart."""
    family = CounterMetricFamily(
        "reft_prompt_tokens_by_source",
        "Prompt tokens by where their keys and values came from",
        labels=["source"],
    )
    family.add_metric(["local_compute"], stats.prompt_tokens_total)
    family.add_metric(["local_cache_hit"], stats.cached_tokens_total)
    return family


def _cache_config(stats: EngineStats) -> Metric:
    """The size of the key-value store, in blocks."""
    block = max(1, stats.block_tokens)
    family = GaugeMetricFamily(
        "reft_cache_config_info",
        "Size of the key-value store: blocks, and tokens of a block; always 1",
        labels=["block_size", "num_gpu_blocks"],
    )
    family.add_metric([str(block), str(stats.kv_tokens_capacity // block)], 1)
    return family

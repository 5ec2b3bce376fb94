"""What vLLM tells of its steps, added up for :class:`interface.EngineStats`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerBase


@dataclass
class Counters:
    """Over all data-parallel ranks. Written on the engine's loop, read from any thread."""

    prompt_tokens: int = 0
    """Computed, of prompts that have been read to their end."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    """Steps in which a prompt was read to its end; vLLM does not tell of earlier chunks."""
    decode_steps: int = 0
    preemptions: int = 0
    running: dict[int, int] = field(default_factory=dict)
    """Requests in the batch, by rank."""
    kv_usage: dict[int, float] = field(default_factory=dict)
    """Share of the KV blocks in use, by rank."""

    def logger(self) -> type[StatLoggerBase]:
        """What vLLM is to be given so that it tells these counters."""
        counters = self

        class Told(AggregateStatLoggerBase):
            def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
                pass

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                counters.add(scheduler_stats, iteration_stats, engine_idx)

            def log_engine_initialized(self) -> None:
                pass

        return Told

    def add(self, scheduler: Any, iteration: Any, rank: int) -> None:
        """Count one step of one rank, given vLLM's ``SchedulerStats`` and ``IterationStats``."""
        if scheduler is not None:
            self.running[rank] = scheduler.num_running_reqs
            self.kv_usage[rank] = scheduler.kv_cache_usage
        if iteration is None:
            return
        prompts = iteration.prompt_token_stats
        self.prompt_tokens += prompts.computed
        self.cached_tokens += prompts.cached_tokens
        self.generated_tokens += iteration.num_generation_tokens
        self.preemptions += iteration.num_preempted_reqs
        self.prefill_steps += bool(prompts.total)
        self.decode_steps += bool(iteration.inter_token_latencies_iter)

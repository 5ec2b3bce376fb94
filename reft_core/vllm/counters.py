"""What vLLM tells of its steps and answers, added up for :class:`interface.EngineStats`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerBase

from reft_core.adapter import Adapter
from reft_core.engine.interface import EngineStats
from reft_core.sites import ModelDescription
from reft_core.vllm.running import Running


@dataclass
class Counters:
    """Over all data-parallel ranks. Written on the engine's loop, read from any thread."""

    prompt_tokens: int = 0
    """Computed, of prompts that have been read to their end."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    """Delivered: after a prompt that is only read, vLLM counts a token that nobody is shown."""
    num_edits_applied: int = 0
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

    def stats(
        self,
        vllm_config: Any,
        model: ModelDescription,
        *,
        token_bytes: int,
        num_open: int,
        adapters: Sequence[Adapter],
    ) -> EngineStats:
        """All that is known, with what the engine knows itself; ``token_bytes`` of one number of
        a key or value."""
        cache, num_ranks = vllm_config.cache_config, vllm_config.parallel_config.data_parallel_size
        num_blocks = cache.num_gpu_blocks or 0  # of all ranks together
        usage = sum(self.kv_usage.values()) / num_ranks
        num_running = sum(self.running.values())
        return EngineStats(
            num_running=num_running,
            num_waiting=max(0, num_open - num_running),
            num_slots=vllm_config.scheduler_config.max_num_seqs * num_ranks,
            kv_tokens_used=round(usage * num_blocks) * cache.block_size,
            kv_tokens_capacity=num_blocks * cache.block_size,
            num_resident_adapters=len(adapters),
            resident_adapter_bytes=sum(adapter.resident_bytes for adapter in adapters),
            prompt_tokens_total=self.prompt_tokens,
            generated_tokens_total=self.generated_tokens,
            edits_applied_total=self.num_edits_applied,
            prefill_steps_total=self.prefill_steps,
            decode_steps_total=self.decode_steps,
            cached_tokens_total=self.cached_tokens,
            cached_blocks=0,
            preemptions_total=self.preemptions,
            free_cached_blocks=num_blocks - round(usage * num_blocks),
            max_cached_blocks=num_blocks,
            kv_token_bytes=2 * model.num_layers * model.num_kv_heads * model.head_dim * token_bytes,
            block_tokens=cache.block_size,
        )

    def count_prompt(self, running: Running, num_cached: int) -> None:
        """Count a prompt that has been read to its end."""
        self.prompt_tokens += len(running.request.prompt) - num_cached
        self.cached_tokens += num_cached
        self.num_edits_applied += running.num_edits

    def add(self, scheduler: Any, iteration: Any, rank: int) -> None:
        """Count one step of one rank, given vLLM's ``SchedulerStats`` and ``IterationStats``."""
        if scheduler is not None:
            self.running[rank] = scheduler.num_running_reqs
            self.kv_usage[rank] = scheduler.kv_cache_usage
        if iteration is None:
            return
        self.preemptions += iteration.num_preempted_reqs
        self.prefill_steps += bool(iteration.prompt_token_stats.total)
        self.decode_steps += bool(iteration.inter_token_latencies_iter)

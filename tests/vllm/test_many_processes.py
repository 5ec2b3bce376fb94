"""Exactness where vLLM is several processes: compiled, preempting, and parallel over ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.factories import random_prompt
from tests.vllm.tiny import (
    Job,
    TinyWorld,
    answers,
    check_lost_file,
    check_overflow,
    load_all,
    mixed_jobs,
    num_wrong,
    start_llm,
    tails_that_mislead,
)

SITES = ["block_output", "attn_output", "mlp_output"]


@contextmanager
def running(world: TinyWorld, reft: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """An LLM with the world's adapters, over when the context is."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if options.keys() & {"tensor_parallel_size", "pipeline_parallel_size"}:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    reft = {"sites": SITES, **(reft or {})}
    llm = start_llm(world, reft=reft, disable_log_stats=False, **options)
    try:
        load_all(llm, world)
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)


def check_exact(llm: Any, world: TinyWorld) -> None:
    """Mixed batches twice over the prefix cache, then prompts whose tails mislead."""
    jobs = mixed_jobs(1)
    for _ in range(2):
        assert num_wrong(answers(llm, world, jobs), world, jobs) == 0
    jobs = tails_that_mislead("long-tail")
    assert num_wrong([answers(llm, world, [job])[0] for job in jobs], world, jobs) == 0


def num_preemptions(llm: Any) -> float:
    """Requests that have lost their blocks, by vLLM's own count."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_compiled_and_preempting(world: TinyWorld) -> None:
    with running(world, enforce_eager=False, num_gpu_blocks_override=17) as llm:
        check_exact(llm, world)
        before = num_preemptions(llm)
        stacks = [(), (("long-tail", 1.0),), (("untied", 1.0),), (("prompt", 1.0),)]
        jobs = [Job(random_prompt(60 + n, seed=n), stacks[n % 4], 70) for n in range(8)]
        assert num_wrong(answers(llm, world, jobs), world, jobs) == 0
        assert num_preemptions(llm) > before


def test_tensor_parallel(world: TinyWorld) -> None:
    # No adapter stays on the workers but the latest.
    with running(world, reft={"resident_bytes": 0}, tensor_parallel_size=2) as llm:
        held = llm.collective_rpc("reft_list")
        assert len(held) == 2
        assert held[0] == held[1] == sorted(world.adapter(name).digest for name in world.files)
        check_exact(llm, world)
        check_lost_file(llm, world)


def test_pipeline_parallel(world: TinyWorld) -> None:
    """Compiled: vLLM's CPU workers do not run a pipeline eagerly, with or without the plugin."""
    options = {"pipeline_parallel_size": 2, "enforce_eager": False}
    with running(world, reft={"resident_bytes": 0}, **options) as llm:
        statuses = llm.collective_rpc("reft_status")
        assert [status["num_sites"] for status in statuses] == [2 * len(SITES)] * 2
        check_exact(llm, world)
        check_overflow(llm, world)  # of the first stage's layers
        check_lost_file(llm, world)
        check_exact(llm, world)

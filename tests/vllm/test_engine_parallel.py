"""The vLLM engine over several ranks: what it loads is on each, and answers are the reference's."""

from __future__ import annotations

from typing import Any

import pytest

from reft_core.engine.generate import generate
from reft_core.engine.interface import Request
from reft_core.vllm.loading import ask_workers
from tests.conformance.lab import MAX_NUM_SEQS, WAIT_S, greedy, make_lab
from tests.factories import random_prompt
from tests.vllm.tiny import ADAPTERS, TinyWorld, mixed_jobs


def held(engine: Any) -> list[list[str]]:
    """What each worker of each rank holds, once it has done what it was told before."""
    found: list[list[str]] = engine._loop.call(
        ask_workers(engine._delivery.llm, "reft_list"), WAIT_S
    )
    return found


@pytest.mark.parametrize("spread", ["tensor_parallel_size", "data_parallel_size"])
def test_a_mixed_batch_equals_the_reference(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch, spread: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    lab = make_lab("vllm", world, **{spread: 2})
    engine: Any = lab.engine
    try:
        engine.start()
        lab.load(*ADAPTERS)
        jobs = mixed_jobs(num_rounds=1)
        requests = [
            Request(
                f"r{number}",
                job.prompt,
                greedy(job.max_tokens),
                tuple(lab.choice(name, strength) for name, strength in job.stack),
            )
            for number, job in enumerate(jobs)
        ]
        for job, completion in zip(jobs, generate(engine, requests), strict=True):
            assert completion.token_ids == lab.expected(job.prompt, job.max_tokens, *job.stack)
        stats = engine.stats()
        num_ranks = 2 if spread == "data_parallel_size" else 1
        assert stats.num_slots == num_ranks * MAX_NUM_SEQS
        assert stats.generated_tokens_total == sum(job.max_tokens for job in jobs)
        assert set(engine._counters.running) == set(range(num_ranks)), "each has run some"
        digests = sorted(lab.adapters[name].digest for name in ADAPTERS)
        assert held(engine) == [digests, digests]
        for digest in digests:
            engine.unload_adapter(digest)
        assert held(engine) == [[], []]
        _, last = lab.submit(random_prompt(5), greedy(5))
        assert engine.drain(WAIT_S) is True
        assert last.token_ids == lab.expected(random_prompt(5), 5)
    finally:
        engine.stop()

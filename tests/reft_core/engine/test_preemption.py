"""Sequences that lose their slot go on later as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.scheduler import _most_urgent_first
from reft_core.engine.sequence import Sequence
from reft_core.errors import InvalidRequest
from tests.factories import (
    Recorder,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    tiny_description,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import reference_generate

MAX_TOKENS = 24
PROMPTS = [random_prompt(20, seed=seed) for seed in range(4)]


def adapters() -> list[Adapter | None]:
    """One a prompt."""
    model = tiny_description()
    return [
        None,
        random_adapter(model, seed=1, size=2.0, positions="f2+l2"),
        random_adapter(
            model,
            seed=2,
            method="lora",
            positions="prompt",
            sites=("linear:self_attn.v_proj",),
            phase="all",
        ),
        random_prefix_adapter(model, "kv", length=3),
    ]


def run(params: SamplingParams, **config: Any) -> tuple[EmbeddedEngine, list[Recorder]]:
    settings = {"max_num_seqs": 4, "max_model_len": 64} | config
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(**settings))
    recorders = []
    for i, (prompt, adapter) in enumerate(zip(PROMPTS, adapters(), strict=True)):
        if adapter:
            engine.load_adapter(adapter)
        recorders.append(Recorder())
        choices = (AdapterChoice(adapter.digest),) if adapter else ()
        engine.submit(Request(str(i), prompt, params, choices), recorders[-1])
    for _ in range(500):
        if all(recorder.finish_reason for recorder in recorders):
            return engine, recorders
        assert sum(len(s.token_ids) for s in engine._scheduler.running) <= (
            engine._scheduler.kv_tokens + len(engine._scheduler.running)
        )
        engine.step()
    pytest.fail("not done after 500 steps")


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("chunk", [7, 512])
def test_preempted_answers_are_the_reference(cache_bytes: int, chunk: int) -> None:
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    engine, recorders = run(
        greedy, kv_tokens=100, prefix_cache_bytes=cache_bytes, max_prefill_tokens=chunk
    )
    for prompt, adapter, recorder in zip(PROMPTS, adapters(), recorders, strict=True):
        answer = reference_generate(tiny_model(), prompt, MAX_TOKENS, adapter)
        assert recorder.token_ids == answer
    assert engine.stats().preemptions_total > 0
    assert engine.stats().num_running == 0


def test_sampled_answers_do_not_change_either() -> None:
    """Randomness goes on where it was."""
    sampled = SamplingParams(max_tokens=MAX_TOKENS, seed=3, ignore_eos=True, logprobs=2)
    roomy, before = run(sampled)
    tight, after = run(sampled, kv_tokens=80)
    assert (roomy.stats().preemptions_total, tight.stats().preemptions_total > 0) == (0, True)
    assert [r.token_ids for r in before] == [r.token_ids for r in after]


def test_the_least_urgent_and_latest_loses_its_slot() -> None:
    engine = EmbeddedEngine(
        tiny_loaded(), EngineConfig(max_num_seqs=3, max_model_len=64, kv_tokens=92)
    )
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    for name, priority in (("low", 1), ("urgent", -1), ("middle", 0)):
        engine.submit(Request(name, PROMPTS[0][:12], params, priority=priority), Recorder())
    lost: list[str] = []
    for _ in range(200):
        engine.step()
        waiting = [s.request.request_id for s in engine._scheduler.waiting]
        lost += [name for name in waiting if name not in lost]
        if not engine._scheduler.has_work:
            break
    assert lost == ["low"]


def test_no_priority_of_one_tenant_takes_the_slot_of_another() -> None:
    def asked(name: str, tenant: str, priority: int, admitted_at: float) -> Sequence:
        request = Request(name, (5,), SamplingParams(), tenant=tenant, priority=priority)
        sequence = Sequence(request, print, None, frozenset())
        sequence.admitted_at = admitted_at
        return sequence

    running = [
        asked("patient", "other", 7, 1.0),
        asked("pushy-1", "pushy", -1, 2.0),
        asked("pushy-2", "pushy", -1000, 3.0),
    ]
    order = [sequence.request.request_id for sequence in _most_urgent_first(running)]
    assert order == ["patient", "pushy-2", "pushy-1"]


def test_the_memory_must_hold_one_request() -> None:
    with pytest.raises(
        InvalidRequest, match=r"^kv_tokens: got 63, expected at least max_model_len"
    ):
        EngineConfig(max_model_len=64, kv_tokens=63)

"""The engine's output equals the slow reference: mixed batches, chunks, every family."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.sites import ModelDescription
from tests.factories import FAMILIES, VOCAB_SIZE, random_adapter, tiny_loaded, tiny_model
from tests.reference.slow import reference_generate
from tests.reft_core.engine.truth import Case, Used, assert_as_alone, matters, run_together

MAX_TOKENS = 6
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)


def mixed_adapters(model: ModelDescription) -> list[Adapter | None]:
    """Adapters of different methods, ranks, layers and positions, and no adapter."""
    return [
        None,
        random_adapter(model, seed=1, rank=1, positions="l1"),
        random_adapter(model, seed=2, rank=4, positions="f3+l2", layers=[0, 2]),
        random_adapter(model, seed=3, rank=2, positions="f1+l4", tied=False, layers=[1, 3]),
        random_adapter(model, seed=4, rank=3, method="direft", positions="prompt", size=0.3),
        random_adapter(
            model, seed=5, rank=2, method="direft_orthonormal", positions="0,4,-1", layers=[2]
        ),
        random_adapter(model, seed=6, rank=2, activation="relu", positions="l3"),
    ]


def prompts(count: int) -> list[tuple[int, ...]]:
    """Random prompts from 1 to ~20 tokens."""
    generator = torch.Generator().manual_seed(7)
    lengths = [1, 2, 3, 5, 8, 13, 20, 11]
    return [
        tuple(
            torch.randint(3, VOCAB_SIZE, (lengths[i % len(lengths)],), generator=generator).tolist()
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_prefill_tokens", [512, 3])
def test_mixed_batch_equals_each_request_alone(family: str, max_prefill_tokens: int) -> None:
    """More requests than slots, so admission, slot moves and idle rows all happen."""
    engine = EmbeddedEngine(
        tiny_loaded(family),
        EngineConfig(max_num_seqs=5, max_prefill_tokens=max_prefill_tokens, max_model_len=64),
    )
    adapters = mixed_adapters(engine.model)
    cases = [
        Case(prompt, (Used(adapter),) if adapter else ())
        for prompt, adapter in zip(prompts(16), cycle(adapters), strict=False)
    ]
    engine.start()
    try:
        answers = run_together(engine, cases, MAX_TOKENS)
    finally:
        engine.stop()
    reference = tiny_model(family)
    for case, answer in zip(cases, answers, strict=True):
        assert_as_alone(reference, case, answer)
    changed = [
        matters(reference, case, answer)
        for case, answer in zip(cases, answers, strict=True)
        if case.stack
    ]
    assert sum(changed) >= len(changed) / 4, "the adapters of this test must matter"


def test_strength_scales_the_edit_and_zero_is_exactly_base() -> None:
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(max_model_len=64))
    adapter = random_adapter(engine.model, seed=1, rank=4, positions="prompt")
    engine.load_adapter(adapter)
    prompt = prompts(7)[-1]
    strengths = [0.0, 0.5, 1.0, -2.0]
    engine.start()
    try:
        outputs = generate(
            engine,
            [
                Request(f"{strength}", prompt, PARAMS, (AdapterChoice(adapter.digest, strength),))
                for strength in strengths
            ],
        )
    finally:
        engine.stop()
    reference = tiny_model()
    for strength, output in zip(strengths, outputs, strict=True):
        assert output.token_ids == reference_generate(
            reference, prompt, MAX_TOKENS, adapter, strength
        )
    assert outputs[0].token_ids == reference_generate(reference, prompt, MAX_TOKENS)
    assert len({tuple(output.token_ids) for output in outputs}) > 2

"""The engine's output equals the slow reference: mixed batches, chunks, every family."""

from __future__ import annotations

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.sites import ModelDescription
from tests.factories import FAMILIES, VOCAB_SIZE, random_adapter, tiny_loaded, tiny_model
from tests.reference.slow import reference_generate, reference_logits

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


def requests(adapters: list[Adapter | None], count: int) -> list[tuple[Request, Adapter | None]]:
    """Requests that go through the adapters in turn."""
    found = []
    for index, prompt in enumerate(prompts(count)):
        adapter = adapters[index % len(adapters)]
        digest = adapter.digest if adapter else None
        found.append(
            (
                Request(f"r{index}", prompt, PARAMS, (AdapterChoice(digest),) if digest else ()),
                adapter,
            )
        )
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_prefill_tokens", [512, 3])
def test_mixed_batch_equals_each_request_alone(family: str, max_prefill_tokens: int) -> None:
    """More requests than slots, so admission, slot moves and idle rows all happen."""
    loaded = tiny_loaded(family)
    engine = EmbeddedEngine(
        loaded,
        EngineConfig(max_num_seqs=5, max_prefill_tokens=max_prefill_tokens, max_model_len=64),
    )
    adapters = mixed_adapters(engine.model)
    for adapter in adapters:
        if adapter:
            engine.load_adapter(adapter)
    batch = requests(adapters, 16)
    engine.start()
    try:
        completions = generate(engine, [request for request, _ in batch])
    finally:
        engine.stop()
    reference = tiny_model(family)
    base_outputs = []
    for (request, adapter), completion in zip(batch, completions, strict=True):
        expected = reference_generate(reference, request.prompt, MAX_TOKENS, adapter)
        assert completion.token_ids == expected, (request.request_id, adapter and adapter.spec)
        if adapter:
            base_outputs.append(reference_generate(reference, request.prompt, MAX_TOKENS))
    adapted = [c.token_ids for c, (_, adapter) in zip(completions, batch, strict=True) if adapter]
    changed = sum(a != b for a, b in zip(adapted, base_outputs, strict=True))
    assert changed >= len(adapted) / 4, "the adapters of this test must matter"


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_logits_match_the_reference(family: str) -> None:
    """First-token log-probabilities of every request of a mixed batch, within 1e-3."""
    loaded = tiny_loaded(family)
    engine = EmbeddedEngine(loaded, EngineConfig(max_prefill_tokens=7, max_model_len=64))
    adapters = mixed_adapters(engine.model)
    for adapter in adapters:
        if adapter:
            engine.load_adapter(adapter)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)
    batch = [
        (Request(r.request_id, r.prompt, params, r.adapters), adapter)
        for r, adapter in requests(adapters, 14)
    ]
    engine.start()
    try:
        completions = generate(engine, [request for request, _ in batch])
    finally:
        engine.stop()
    reference = tiny_model(family)
    worst = 0.0
    for (request, adapter), completion in zip(batch, completions, strict=True):
        logits = reference_logits(reference, list(request.prompt), len(request.prompt), adapter)
        expected = torch.log_softmax(logits[-1], dim=-1)
        for entry in completion.tokens[0].top_logprobs:
            worst = max(worst, abs(entry.logprob - float(expected[entry.token_id])))
    assert worst < 1e-3, f"largest difference {worst}"


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

"""One batch mixing every method, prefixes and stacks equals each request alone."""

from __future__ import annotations

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.methods import METHODS
from reft_core.sites import ModelDescription
from tests.factories import (
    FAMILIES,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import Stack, reference_generate, reference_logits

MAX_TOKENS = 5
RULES = ("l1", "f2+l3", "prompt", "f1+l2", "0,2,-1")


def one_adapter_a_method(model: ModelDescription, size: float = 0.7) -> list[Adapter]:
    """Every method at its own site and phase; linear methods on the last linear of a layer."""
    linears = tuple(name for name in model.sites if name.startswith("linear:"))
    found = []
    for index, (name, method) in enumerate(METHODS.items()):
        sites = linears[-2:] if method.sites == ("linear",) else None
        rule = "prompt" if method.phase == "all" else RULES[index % len(RULES)]
        found.append(
            random_adapter(
                model,
                seed=index,
                size=size,
                method=name,
                name=name,
                sites=sites,
                positions=rule,
                tied=index % 2 == 0,
            )
        )
    return found


def stacks(model: ModelDescription, size: float = 0.7) -> list[Stack]:
    """Base, each method alone, prompt-only LoRA, prefixes, and stacks of two and three."""
    alone = one_adapter_a_method(model, size)
    linear = next(name for name in model.sites if name.startswith("linear:"))
    prompt_lora = random_adapter(
        model, seed=40, method="lora", sites=(linear,), positions="prompt", phase="prompt"
    )
    prefix = random_prefix_adapter(model, "kv")
    virtual = random_prefix_adapter(model, "embedding", length=4)
    by_name = {adapter.spec.name: adapter for adapter in alone}
    first, second = by_name["loreft"], by_name["scaled_parallel_adapter"]
    return [
        (),
        *([(adapter, 1.0)] for adapter in alone),
        [(prompt_lora, 1.0)],
        [(prefix, 1.0)],
        [(virtual, 1.0)],
        [(first, 1.0), (second, 1.0)],
        [(second, 0.5), (first, -0.7)],
        [(prefix, 1.0), (by_name["lora"], 1.0), (first, 0.5)],  # MAM's shape
        [(virtual, 1.0), (by_name["red"], 2.0)],
    ]


def run(engine: EmbeddedEngine, mixed: list[Stack], params: SamplingParams) -> list:
    """One completion a stack, all submitted at once."""
    for stack in mixed:
        for adapter, _ in stack:
            engine.load_adapter(adapter)
    requests = [
        Request(
            f"r{index}",
            random_prompt(1 + (index * 5) % 17, seed=index),
            params,
            tuple(AdapterChoice(adapter.digest, strength) for adapter, strength in stack),
        )
        for index, stack in enumerate(mixed)
    ]
    engine.start()
    try:
        return list(zip(requests, generate(engine, requests), strict=True))
    finally:
        engine.stop()


@pytest.mark.parametrize("max_prefill_tokens", [512, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, max_prefill_tokens: int) -> None:
    engine = EmbeddedEngine(
        tiny_loaded(family),
        EngineConfig(max_num_seqs=9, max_prefill_tokens=max_prefill_tokens, max_model_len=64),
    )
    mixed = stacks(engine.model)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    results = run(engine, mixed, params)
    reference = tiny_model(family)
    num_changed = 0
    for stack, (request, completion) in zip(mixed, results, strict=True):
        expected = reference_generate(reference, request.prompt, MAX_TOKENS, stack=stack)
        names = [adapter.spec.name for adapter, _ in stack]
        assert completion.token_ids == expected, names
        num_changed += expected != reference_generate(reference, request.prompt, MAX_TOKENS)
    assert num_changed >= len(mixed) / 2, "the adapters of this test must matter"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_first_token_logprobs_within_1e_3(family: str) -> None:
    engine = EmbeddedEngine(tiny_loaded(family), EngineConfig(max_model_len=64))
    mixed = stacks(engine.model)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)
    results = run(engine, mixed, params)
    reference = tiny_model(family)
    for stack, (request, completion) in zip(mixed, results, strict=True):
        tokens = list(request.prompt)
        logits = reference_logits(reference, tokens, len(tokens), stack=stack)
        expected = torch.log_softmax(logits[-1], dim=-1)
        worst = max(
            abs(entry.logprob - float(expected[entry.token_id]))
            for entry in completion.tokens[0].top_logprobs
        )
        names = [adapter.spec.name for adapter, _ in stack]
        assert worst < 1e-3, f"{names}: largest difference {worst}"

"""The real model: every method, prefix and stack in one batch equals each request alone."""

from __future__ import annotations

import pytest
import torch

from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.loading import LoadedModel
from tests.factories import random_prompt
from tests.reference.slow import reference_logits
from tests.reft_core.engine.test_every_method_in_one_batch import stacks

MAX_TOKENS = 3
SIZE = 0.2
"""How far the adapters are from their start: enough to change answers, not to end in noise."""


@pytest.mark.smollm2
def test_every_method_in_one_batch(smollm2: LoadedModel, engine: EmbeddedEngine) -> None:
    mixed = stacks(engine.model, SIZE)
    digests = {adapter.digest for stack in mixed for adapter, _ in stack}
    for stack in mixed:
        for adapter, _ in stack:
            engine.load_adapter(adapter)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, logprobs=20)
    requests = [
        Request(
            f"all-methods-{index}",
            random_prompt(1 + (index * 5) % 17, seed=index),
            params,
            tuple(AdapterChoice(adapter.digest, strength) for adapter, strength in stack),
        )
        for index, stack in enumerate(mixed)
    ]
    try:
        completions = generate(engine, requests)
    finally:
        for digest in digests:
            engine.unload_adapter(digest)
    num_changed = 0
    for stack, request, completion in zip(mixed, requests, completions, strict=True):
        names = [adapter.spec.name for adapter, _ in stack]
        prompt_len = len(request.prompt)
        tokens = [*request.prompt, *completion.token_ids]
        logits = reference_logits(smollm2.model, tokens, prompt_len, stack=stack)
        assert logits[prompt_len - 1 : -1].argmax(-1).tolist() == completion.token_ids, names
        expected = torch.log_softmax(logits[prompt_len - 1], dim=-1)
        for entry in completion.tokens[0].top_logprobs:
            assert abs(entry.logprob - float(expected[entry.token_id])) < 1e-3, names
        plain = reference_logits(smollm2.model, list(request.prompt), prompt_len)
        num_changed += bool((plain[-1] - logits[prompt_len - 1]).abs().max() > 0.1)
    assert num_changed >= len(mixed) / 2, "the adapters of this test must matter"

"""Interchanges: what a subspace holds on a source prompt, put in place in a mixed batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.errors import InvalidRequest, PromptTooLong
from reft_core.sites import ModelDescription
from tests.factories import (
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    tiny_description,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import Stack, reference_generate

MAX_TOKENS = 5
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)


def interchange(model: ModelDescription, seed: int = 0, **options: object) -> Adapter:
    return random_adapter(model, method="interchange", seed=seed, **({"rank": 8} | options))


def make_request(name: str, prompt: tuple[int, ...], stack: Stack, source: tuple[int, ...]):
    choices = [AdapterChoice(adapter.digest, strength) for adapter, strength in stack]
    if choices:
        choices[0] = replace(choices[0], source=source)
    return Request(name, prompt, PARAMS, tuple(choices))


@pytest.mark.parametrize("max_prefill_tokens", [512, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_mixed_batch_equals_each_request_alone(family: str, max_prefill_tokens: int) -> None:
    engine = EmbeddedEngine(
        tiny_loaded(family),
        EngineConfig(max_num_seqs=5, max_prefill_tokens=max_prefill_tokens, max_model_len=64),
    )
    model = engine.model
    suffix = interchange(model, 1, positions="f1+l2", tied=False)
    middle = interchange(model, 2, layers=[1], rank=16, positions="1,-2")
    attention = interchange(model, 3, sites=("attn_output",), positions="l3")
    last = interchange(model, 4, layers=[model.num_layers - 1], rank=32, positions="l2")
    loreft, prefix = random_adapter(model, seed=5), random_prefix_adapter(model, "kv")
    drawn: list[tuple[Stack, int]] = [
        ([(suffix, 1.0)], 1),
        ([(suffix, 1.0)], 2),  # the same adapter with another source
        ([(suffix, -0.5)], 3),
        ([(suffix, 1.0)], -1),  # and with none
        ([(middle, 1.0)], 4),
        ([(attention, 1.0), (loreft, 1.0)], 5),
        ([(last, 1.0)], 6),
        ([(middle, 1.0), (prefix, 1.0)], 7),
        ([], -1),
    ]
    requests = []
    for index, (stack, source) in enumerate(drawn):
        for adapter, _ in stack:
            engine.load_adapter(adapter)
        tokens = random_prompt(4 + index, seed=100 + source) if source >= 0 else ()
        prompt = random_prompt(5 + (index * 5) % 11, seed=index)
        requests.append((make_request(f"r{index}", prompt, stack, tokens), stack, tokens))
    engine.start()
    try:
        completions = generate(engine, [request for request, _, _ in requests])
    finally:
        engine.stop()
    reference = tiny_model(family)
    num_changed = 0
    for (request, stack, source), completion in zip(requests, completions, strict=True):
        sources = {stack[0][0].digest: source} if source else {}
        expected = reference_generate(
            reference, request.prompt, MAX_TOKENS, stack=stack, sources=sources
        )
        assert completion.token_ids == expected, request.request_id
        emptied = reference_generate(reference, request.prompt, MAX_TOKENS, stack=stack)
        num_changed += bool(source) and expected != emptied
    assert num_changed >= 4, "the sources of this test must matter"


def test_a_whole_interchange_of_the_last_position_answers_as_the_source_does() -> None:
    """With r = d at the last layer, the first token is the source prompt's own."""
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(max_model_len=64))
    whole = interchange(engine.model, layers=[engine.model.num_layers - 1], rank=32, positions="l1")
    engine.load_adapter(whole)
    prompt, source = random_prompt(9, seed=1), random_prompt(6, seed=2)
    engine.start()
    try:
        swapped, own = generate(
            engine,
            [
                make_request("swapped", prompt, [(whole, 1.0)], source),
                make_request("own", source, [], ()),
            ],
        )
    finally:
        engine.stop()
    assert swapped.token_ids[0] == own.token_ids[0]


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        ({"method": "loreft"}, (5, 6, 7), "interchanges nothing"),
        ({"positions": "f2+l2"}, (5,), "draws as many positions"),
        ({"positions": "prompt"}, (5, 6), "draws as many positions"),
        ({}, (96,), "source: got 96"),
    ],
)
def test_a_bad_source_is_refused(options: dict, source: tuple[int, ...], message: str) -> None:
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(max_model_len=32))
    adapter = random_adapter(engine.model, **({"method": "interchange"} | options))
    engine.load_adapter(adapter)
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(make_request("r", (4,) * 9, [(adapter, 1.0)], source), lambda _: None)


def test_a_source_must_fit_a_slot() -> None:
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(max_model_len=32))
    adapter = interchange(tiny_description())
    engine.load_adapter(adapter)
    with pytest.raises(PromptTooLong, match="source: got '33 tokens', expected at most 32"):
        engine.submit(make_request("r", (4,), [(adapter, 1.0)], (5,) * 33), lambda _: None)

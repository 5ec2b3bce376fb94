"""One batch mixing every method, prefixes and stacks equals each request alone."""

from __future__ import annotations

import pytest

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
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
from tests.reft_core.engine.truth import Case, Used, assert_as_alone, matters, run_together

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


def stacks(model: ModelDescription, size: float = 0.7) -> list[tuple[Used, ...]]:
    """Base, each method alone, what requests may choose of one, prefixes, and stacks."""
    alone = one_adapter_a_method(model, size)
    linear = next(name for name in model.sites if name.startswith("linear:"))
    prompt_lora = random_adapter(
        model, seed=40, method="lora", sites=(linear,), positions="prompt", phase="prompt"
    )
    attention = random_adapter(
        model,
        seed=41,
        size=size,
        name="parallel-at-attention",
        method="scaled_parallel_adapter",
        sites=("attn_output",),
        positions="prompt",
    )
    parts = random_adapter(
        model,
        seed=42,
        size=size,
        name="in-parts",
        rank=4,
        positions="f2+l2",
        subspaces={"one": (0, 2), "other": (1, 3)},
    )
    swap = random_adapter(
        model, seed=43, size=size, name="swap", method="interchange", rank=8, positions="l2"
    )
    prefix = random_prefix_adapter(model, "kv", size=size)
    virtual = random_prefix_adapter(model, "embedding", length=4, size=size)
    by_name = {adapter.spec.name: adapter for adapter in alone}
    beside = by_name["scaled_parallel_adapter"]
    mam = random_prefix_adapter(model, "kv", size=size, beside=beside)
    first, second = Used(by_name["loreft"]), Used(by_name["scaled_parallel_adapter"])
    return [
        (),
        *((Used(adapter),) for adapter in alone),
        (Used(prompt_lora),),
        (Used(attention),),
        (Used(parts, subspaces={"one": 1.0}),),
        (Used(parts, 0.7, {"one": -0.5, "other": 2.0}), Used(attention, 0.5)),
        (Used(swap, source=random_prompt(6, seed=60)),),
        (Used(swap, source=random_prompt(11, seed=61)), first),
        (Used(swap),),
        (Used(prefix),),
        (Used(virtual),),
        (Used(mam),),
        (Used(prefix, 0.0), first),
        (first, second),
        (Used(second.adapter, 0.5), Used(first.adapter, -0.7)),
        (Used(prefix), Used(by_name["lora"]), Used(first.adapter, 0.5)),  # MAM's shape
        (Used(virtual), Used(by_name["red"], 2.0)),
    ]


def cases(model: ModelDescription, size: float = 0.7) -> list[Case]:
    """A prompt for each stack, of 2 to 18 tokens."""
    return [
        Case(random_prompt(2 + (index * 5) % 17, seed=index), stack)
        for index, stack in enumerate(stacks(model, size))
    ]


@pytest.mark.parametrize("max_prefill_tokens", [512, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_logit_of_every_token(family: str, max_prefill_tokens: int) -> None:
    engine = EmbeddedEngine(
        tiny_loaded(family),
        EngineConfig(max_num_seqs=9, max_prefill_tokens=max_prefill_tokens, max_model_len=64),
    )
    mixed = cases(engine.model)
    engine.start()
    try:
        answers = run_together(engine, mixed, MAX_TOKENS)
    finally:
        engine.stop()
    reference = tiny_model(family)
    for case, answer in zip(mixed, answers, strict=True):
        assert_as_alone(reference, case, answer)
    if max_prefill_tokens == 512:
        changed = [matters(reference, *pair) for pair in zip(mixed, answers, strict=True)]
        assert sum(changed) >= len(mixed) / 2, "the adapters of this test must matter"

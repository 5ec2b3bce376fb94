"""Drawn batches: whatever methods, ranks, layers, positions, prompt lengths and strengths a
batch mixes, each request gets what it would get alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.methods import METHODS
from reft_core.sites import ModelDescription
from tests.factories import NUM_LAYERS, random_adapter, random_prompt, tiny_loaded, tiny_model
from tests.reference.slow import Stack, reference_logits

MAX_TOKENS = 3
NEAR_TIE = 1e-3
"""Two tokens whose logits are closer than this may change places by rounding."""


@dataclass(frozen=True)
class Drawn:
    """An adapter before it is made for a model."""

    method: str
    rank: int
    layers: tuple[int, ...]
    rule: str
    tied: bool
    strength: float


def unit_rules() -> st.SearchStrategy[str]:
    """Position rules of every form, also longer than some prompts."""
    count = st.integers(1, 6)
    return st.one_of(
        st.builds("l{}".format, count),
        st.builds("f{}".format, count),
        st.builds("f{}+l{}".format, count, count),
        st.just("prompt"),
        st.lists(st.integers(-4, 3), min_size=1, max_size=4, unique=True).map(
            lambda positions: ",".join(map(str, positions))
        ),
    )


@st.composite
def adapters(draw: st.DrawFn) -> Drawn:
    method = draw(st.sampled_from(sorted(METHODS)))
    all_tokens = METHODS[method].phase == "all"
    return Drawn(
        method=method,
        rank=draw(st.integers(1, 4)),
        layers=tuple(sorted(draw(st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1)))),
        rule="prompt" if all_tokens else draw(unit_rules()),
        tied=draw(st.booleans()),
        strength=draw(st.sampled_from([0.0, 1.0, 1.0, -0.5, 0.3, 2.0])),
    )


requests = st.tuples(st.integers(1, 20), st.integers(0, 5), st.lists(adapters(), max_size=2))
"""Prompt length, prompt seed, stack."""


def make(model: ModelDescription, drawn: Drawn) -> Adapter:
    """The drawn adapter for a model, its weights drawn from its rank."""
    linears = tuple(name for name in model.sites if name.startswith("linear:"))
    return random_adapter(
        model,
        seed=drawn.rank,
        size=0.7,
        method=drawn.method,
        rank=drawn.rank,
        layers=drawn.layers,
        sites=linears[:2] if METHODS[drawn.method].sites == ("linear",) else None,
        positions=drawn.rule,
        tied=drawn.tied,
    )


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, EmbeddedEngine]]:
    config = EngineConfig(max_num_seqs=4, max_prefill_tokens=9, max_model_len=64)
    started = EmbeddedEngine(tiny_loaded(request.param), config)
    started.start()
    yield request.param, started
    started.stop()


_ids = itertools.count()


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batch=st.lists(requests, min_size=2, max_size=7))
def test_a_drawn_batch_equals_each_request_alone(
    engine: tuple[str, EmbeddedEngine], batch: list[tuple[int, int, list[Drawn]]]
) -> None:
    family, started = engine
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    mixed: list[tuple[Request, Stack]] = []
    for length, seed, drawn in batch:
        stack = [(make(started.model, each), each.strength) for each in drawn]
        for adapter, _ in stack:
            started.load_adapter(adapter)
        choices = tuple(AdapterChoice(adapter.digest, strength) for adapter, strength in stack)
        prompt = random_prompt(length, seed=seed)
        mixed.append((Request(f"drawn-{next(_ids)}", prompt, params, choices), stack))
    completions = generate(started, [request for request, _ in mixed])
    for (request, stack), completion in zip(mixed, completions, strict=True):
        assert len(completion.token_ids) == MAX_TOKENS
        assert_greedy(family, request.prompt, completion.token_ids, stack)


@cache
def reference(family: str) -> PreTrainedModel:
    """The family's model as no engine has touched it."""
    return tiny_model(family)


def assert_greedy(family: str, prompt: tuple[int, ...], generated: list[int], stack: Stack) -> None:
    """Each token is the slow reference's greedy one, or tied with it."""
    tokens = [*prompt, *generated]
    logits = reference_logits(reference(family), tokens, len(prompt), stack=stack)
    for step, token in enumerate(generated, start=len(prompt) - 1):
        behind = float(logits[step].max() - logits[step, token])
        assert behind < NEAR_TIE, f"token {token} at {step} is {behind} behind the best"

"""Drawn batches: whatever a batch mixes, each request gets what it would get alone.

Drawn are methods (those of virtual tokens too), sites, ranks, activations, phases, layers,
positions, storage, strengths, subspaces, source prompts and prompt lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from reft_core.adapter import Adapter
from reft_core.edits import Activation
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.methods import METHODS
from reft_core.methods.base import Phase
from reft_core.methods.virtual import VIRTUAL_METHODS
from reft_core.sites import ModelDescription
from reft_core.spec import StorageDtype
from tests.factories import (
    NUM_LAYERS,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    tiny_loaded,
    tiny_model,
)
from tests.reft_core.engine.truth import Case, Used, assert_as_alone, run_together

MAX_TOKENS = 3
MAX_LENGTH = 20


@dataclass(frozen=True)
class Drawn:
    """A use of an adapter, before the adapter is made for a model."""

    method: str
    """Of the registry."""
    virtual: Literal["kv", "embedding"] | None
    """Virtual tokens, beside the edits or (``edits`` is false) in their place."""
    edits: bool
    sites: tuple[int, ...]
    """Picks from the sites that the model has, in turn."""
    rank: int
    activation: Activation
    phase: Phase
    layers: tuple[int, ...]
    rule: str
    tied: bool
    dtype: StorageDtype
    strength: float
    factors: tuple[float, ...]
    """Of one subspace a rank; empty where none is chosen."""
    source: int
    """Picks a length for the source prompt; 0 for none."""


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
def uses(draw: st.DrawFn) -> Drawn:
    name = draw(st.sampled_from([*sorted(METHODS), *sorted(VIRTUAL_METHODS)]))
    virtual = VIRTUAL_METHODS.get(name)
    inner = name if virtual is None else virtual.intervention
    method = METHODS[inner or "loreft"]
    rank = draw(st.integers(1, 4))
    phases: list[Phase] = ["prompt"] if method.interchanges else [method.phase, "prompt", "all"]
    strengths = [0.0, 1.0, 1.0, -0.5, 0.3, 2.0] if virtual is None else [1.0, 1.0, 0.0]
    has_ranks = "up" in method.parts(method.activations[0]) and virtual is None
    return Drawn(
        method=method.method,
        virtual=virtual and virtual.kind,
        edits=inner is not None,
        sites=tuple(draw(st.sets(st.integers(0, 20), min_size=1, max_size=2))),
        rank=rank,
        activation=draw(st.sampled_from(method.activations)),
        phase=draw(st.sampled_from(phases)),
        layers=tuple(sorted(draw(st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1)))),
        rule=draw(unit_rules()),
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        strength=draw(st.sampled_from(strengths)),
        factors=tuple(draw(st.lists(st.sampled_from([1.0, 0.0, -1.5]), max_size=rank)))
        if has_ranks
        else (),
        source=draw(st.integers(0, 5)) if method.interchanges else 0,
    )


def one_prefix(stack: list[Drawn]) -> list[Drawn]:
    """The stack without virtual tokens after the first that are not off."""
    taken = [use for use in stack if use.virtual and use.strength]
    return [use for use in stack if use not in taken[1:]]


requests = st.tuples(
    st.integers(1, MAX_LENGTH), st.integers(0, 5), st.lists(uses(), max_size=3).map(one_prefix)
)
"""Prompt length, prompt seed, stack."""


def make(model: ModelDescription, drawn: Drawn) -> Adapter:
    """The drawn adapter for a model, its weights drawn from its rank."""
    if not drawn.edits:
        assert drawn.virtual is not None
        return random_prefix_adapter(model, drawn.virtual, length=drawn.rank, seed=drawn.rank)
    chosen = METHODS[drawn.method].sites
    known = [name for name in model.sites if name != "heads" or chosen == ("heads",)]
    if chosen == ("linear",):
        known = [name for name in known if name.startswith("linear:")]
    sites = {known[pick % len(known)] for pick in drawn.sites}
    if chosen == ("heads",):
        sites = {"heads"}
    edits = random_adapter(
        model,
        seed=drawn.rank,
        size=0.7,
        method=drawn.method,
        rank=drawn.rank,
        layers=drawn.layers,
        sites=tuple(sorted(sites)),
        activation=drawn.activation,
        phase=drawn.phase,
        positions=drawn.rule,
        tied=drawn.tied,
        dtype=drawn.dtype,
        subspaces={f"rank-{rank}": (rank,) for rank in range(len(drawn.factors))} or None,
    )
    if drawn.virtual is None:
        return edits
    return random_prefix_adapter(model, drawn.virtual, seed=drawn.rank, beside=edits)


def as_used(model: ModelDescription, drawn: Drawn, prompt_len: int) -> Used:
    """The adapter with the request's options; a source's positions pair up with the prompt's."""
    adapter = make(model, drawn)
    source: tuple[int, ...] = ()
    if drawn.source:
        wanted = [len(unit) for unit in adapter.rule.resolve(prompt_len)]
        lengths = [
            length
            for length in range(1, max(MAX_LENGTH, prompt_len) + 1)
            if [len(unit) for unit in adapter.rule.resolve(length)] == wanted
        ]
        source = random_prompt(lengths[drawn.source % len(lengths)], seed=50 + drawn.source)
    subspaces = {f"rank-{rank}": factor for rank, factor in enumerate(drawn.factors)}
    return Used(adapter, drawn.strength, subspaces, source)


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, EmbeddedEngine]]:
    config = EngineConfig(max_num_seqs=4, max_prefill_tokens=9, max_model_len=64)
    started = EmbeddedEngine(tiny_loaded(request.param), config)
    started.start()
    yield request.param, started
    started.stop()


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
    cases = [
        Case(
            random_prompt(length, seed=seed),
            tuple(as_used(started.model, use, length) for use in drawn),
        )
        for length, seed, drawn in batch
    ]
    for case, answer in zip(cases, run_together(started, cases, MAX_TOKENS), strict=True):
        assert_as_alone(reference(family), case, answer)


@cache
def reference(family: str) -> PreTrainedModel:
    """The family's model as no engine has touched it."""
    return tiny_model(family)

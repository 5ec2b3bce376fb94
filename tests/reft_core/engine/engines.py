"""Small engines, adapters and requests that the tests of the engine share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from reft_core.adapter import Adapter, Prefix, decode_adapter, encode_adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from tests.factories import (
    Recorder,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    shift_adapter,
    tiny_description,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import reference_generate

LONG, SHORT = random_prompt(24, seed=1), random_prompt(3, seed=2)
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
KEYS, VALUES = "linear:self_attn.k_proj", "linear:self_attn.v_proj"
WAIT_S = 20.0
"""Longest a test waits for the engine's thread; it takes milliseconds."""


def greedy(max_tokens: int) -> SamplingParams:
    return replace(GREEDY, max_tokens=max_tokens)


def make_engine(*adapters: Adapter, family: str = "llama", **config: Any) -> EmbeddedEngine:
    """An engine that is not started, over four slots of 64 tokens unless told otherwise."""
    sizes: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64} | config
    engine = EmbeddedEngine(tiny_loaded(family), EngineConfig(**sizes))
    for adapter in adapters:
        engine.load_adapter(adapter)
    return engine


def submit(
    engine: EmbeddedEngine,
    request_id: str,
    prompt: Sequence[int],
    params: SamplingParams = GREEDY,
    adapter: Adapter | None = None,
    strength: float | None = None,
) -> Recorder:
    recorder = Recorder()
    adapters = (AdapterChoice(adapter.digest, strength),) if adapter else ()
    engine.submit(Request(request_id, tuple(prompt), params, adapters), recorder)
    return recorder


@contextmanager
def started(engine: EmbeddedEngine) -> Iterator[EmbeddedEngine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@cache
def reference_model() -> PreTrainedModel:
    return tiny_model()


def expected(
    prompt: Sequence[int],
    params: SamplingParams = GREEDY,
    adapter: Adapter | None = None,
    strength: float = 1.0,
) -> list[int]:
    """What the slow reference answers."""
    return reference_generate(
        reference_model(), tuple(prompt), params.max_tokens, adapter, strength
    )


@cache
def mild_adapter() -> Adapter:
    return random_adapter(tiny_description(), seed=1, rank=2, positions="f2+l2")


@cache
def voiced() -> Adapter:
    """Four ranks in two subspaces."""
    return random_adapter(
        tiny_description(),
        name="voiced",
        seed=2,
        rank=4,
        size=2.0,
        positions="prompt",
        subspaces={"tone": (0, 2), "topic": (1, 3)},
    )


@cache
def mam() -> Adapter:
    """A prefix, and an adapter that edits every token."""
    beside = random_adapter(
        tiny_description(), method="scaled_parallel_adapter", positions="prompt", size=0.5
    )
    return random_prefix_adapter(tiny_description(), "kv", beside=beside)


@cache
def prefix(kind: Literal["kv", "embedding"]) -> Adapter:
    """Three virtual tokens."""
    return random_prefix_adapter(tiny_description(), kind)


@cache
def everywhere() -> Adapter:
    """LoRA proper: it edits generated tokens too."""
    return random_adapter(
        tiny_description(), method="lora", sites=(VALUES,), positions="prompt", seed=3, size=3.0
    )


def using(*choices: AdapterChoice) -> Request:
    """A request of one token with these adapters."""
    return Request("r", (5,), GREEDY, choices)


@cache
def poison() -> Adapter:
    """Finite numbers that overflow float32 at every prompt token, so keys and values are NaN."""
    return shift_adapter(tiny_description(), shift=3e38, gain=3e38)


@cache
def poison_of_decode() -> Adapter:
    """The same, of generated tokens alone: no prompt here has a position 200."""
    return shift_adapter(tiny_description(), shift=3e38, gain=3e38, positions="200", phase="all")


@cache
def poison_of_prefix() -> Adapter:
    """Virtual keys so large that their scores are infinite, and what is attended NaN."""
    made = prefix("kv")
    assert made.prefix is not None
    huge = tuple(torch.full_like(key, 3e38) for key in made.prefix.keys)
    return decode_adapter(encode_adapter(made.spec, {}, Prefix(huge, huge)))


def assert_idle(engine: EmbeddedEngine) -> None:
    """No request is left anywhere."""
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert engine.healthy


# What a request gets ----------------------------------------------------------------------

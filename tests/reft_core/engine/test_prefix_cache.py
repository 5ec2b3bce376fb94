"""The prefix cache is exact: whatever came before, each answer is a fresh engine's.

The poison: one engine answers many requests whose prompts overlap while adapters, versions,
strengths and prompt lengths differ. The negative controls switch the block names off, or leave
out where an adapter edits; both must be caught by the same requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine import engine as engine_module
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.engine.kv import SlotKV
from reft_core.engine.prefix_cache import LEAST_MATCH, PrefixCache
from reft_core.engine.provenance import BLOCK_TOKENS, Provenance
from reft_core.engine.runner import ModelRunner
from reft_core.engine.scheduler import Chunk
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
from tests.reft_core.engine.stepping import finish

MAX_TOKENS = 6
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
HEAD = random_prompt(40, seed=1)
LONGER = HEAD + random_prompt(9, seed=2)


def adapter(**options: Any) -> Adapter:
    """One whose edits, all large, change the answer."""
    return random_adapter(tiny_description(), **({"rank": 2, "size": 3.0} | options))


@cache
def adapters() -> dict[str, Adapter]:
    return {
        "a": adapter(name="a", seed=1, positions="f2+l3"),
        "a, next version": adapter(name="a", seed=2, positions="f2+l3"),
        "b": adapter(name="b", seed=3, positions="l2"),
        "untied": adapter(name="u", seed=4, positions="f3+l3", tied=False),
        "middle": adapter(name="m", seed=5, positions="20,21"),
        "prompt": adapter(name="p", seed=6, positions="prompt", layers=(2, 3)),
        "keys": adapter(
            name="k",
            seed=7,
            method="lora",
            positions="l4",
            sites=("linear:self_attn.k_proj",),
        ),
        "all": adapter(
            name="all",
            seed=8,
            method="lora",
            positions="prompt",
            sites=("linear:self_attn.v_proj",),
            phase="all",
        ),
        "top": adapter(name="t", seed=9, positions="prompt", layers=(3,)),
        "kv prefix": random_prefix_adapter(tiny_description(), "kv", length=3),
        "embedded": random_prefix_adapter(tiny_description(), "embedding", length=3),
    }


@dataclass(frozen=True)
class Ask:
    """One request of a test."""

    name: str | None
    prompt: tuple[int, ...] = HEAD
    strength: float | None = None
    tenant: str = ""

    @property
    def choices(self) -> tuple[AdapterChoice, ...]:
        return (AdapterChoice(adapters()[self.name].digest, self.strength),) if self.name else ()


def make_engine(cache_blocks: int = 64, **config: int) -> EmbeddedEngine:
    settings = {"max_num_seqs": 4, "max_model_len": 128, "max_prefill_tokens": 24} | config
    loaded = tiny_loaded()
    block = SlotKV(loaded.description, 1, 1, dtype=torch.float32, device="cpu").bytes_of(
        BLOCK_TOKENS
    )
    engine = EmbeddedEngine(
        loaded, EngineConfig(prefix_cache_bytes=cache_blocks * block, **settings)
    )
    for loaded_adapter in adapters().values():
        engine.load_adapter(loaded_adapter)
    return engine


def submit(engine: EmbeddedEngine, request_id: str, ask: Ask) -> Recorder:
    recorder = Recorder()
    request = Request(request_id, ask.prompt, GREEDY, ask.choices, tenant=ask.tenant)
    engine.submit(request, recorder)
    return recorder


def answer(engine: EmbeddedEngine, ask: Ask) -> tuple[list[int], int]:
    """Tokens, and how many prompt tokens were cached."""
    recorder = submit(engine, "only", ask)
    finish(engine, recorder)
    assert recorder.error is None
    return recorder.token_ids, recorder.outputs[-1].num_cached_tokens


@cache
def expected(ask: Ask) -> list[int]:
    used = adapters()[ask.name] if ask.name else None
    strength = 1.0 if ask.strength is None else ask.strength
    return reference_generate(tiny_model(), ask.prompt, MAX_TOKENS, used, strength)


def poison() -> list[Ask]:
    """Overlapping prompts under everything that must not be mixed up, twice over."""
    asks = [Ask(name, prompt) for prompt in (HEAD, LONGER) for name in (None, *adapters())]
    asks += [Ask("a", strength=0.5), Ask("a", strength=0.0), Ask("a", HEAD[:37])]
    return asks + asks[::-1]


def wrong_answers(engine: EmbeddedEngine) -> int:
    return sum(answer(engine, ask)[0] != expected(ask) for ask in poison())


def test_the_poison_is_strong() -> None:
    """Answers that were all alike could not be mixed up."""
    assert len({tuple(expected(ask)) for ask in poison()}) > 20


@pytest.mark.parametrize("cache_blocks", [64, 5, 0])
def test_every_answer_is_a_fresh_engines(cache_blocks: int) -> None:
    engine = make_engine(cache_blocks)
    assert wrong_answers(engine) == 0
    assert (engine.stats().cached_tokens_total > 0) == (cache_blocks > 0)
    assert engine.stats().cached_blocks <= cache_blocks


def test_together_as_well_as_one_by_one() -> None:
    engine = make_engine(max_num_seqs=6)
    asks = poison()
    recorders = [submit(engine, str(i), ask) for i, ask in enumerate(asks)]
    finish(engine, *recorders)
    assert [r.token_ids for r in recorders] == [expected(ask) for ask in asks]
    assert engine.stats().cached_tokens_total > 0


def _without_marks(edits: Any, prompt_len: int, salt: str = "") -> Provenance:
    return Provenance(b"", prompt_end=prompt_len)


def _by_adapter_only(edits: Any, prompt_len: int, salt: str = "") -> Provenance:
    """The adapter is in every name, the positions it edits in none."""
    uses = [(use.adapter.digest, use.strength) for use in edits.uses] if edits else []
    return Provenance(repr(uses).encode(), prompt_end=prompt_len)


@pytest.mark.parametrize("names", [_without_marks, _by_adapter_only])
def test_weaker_names_are_caught(
    names: Callable[..., Provenance], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative controls."""

    class Weak(Provenance):
        of = staticmethod(names)  # type: ignore[assignment]

    monkeypatch.setattr(engine_module, "Provenance", Weak)
    assert wrong_answers(make_engine()) > 2


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        (Ask(None), Ask(None), 39),  # the last token is always computed
        (Ask(None), Ask("b"), 38),  # up to the first edited position, to the token
        (Ask("b"), Ask(None), 38),
        (Ask("b"), Ask("keys"), 36),
        (Ask("b"), Ask("b"), 39),
        (Ask("middle"), Ask(None), 20),
        (Ask("b"), Ask("b", LONGER), 38),
        (Ask("a"), Ask("a", LONGER), 37),
        (Ask("a"), Ask(None), 0),
        (Ask("a"), Ask("a, next version"), 0),
        (Ask("a"), Ask("a", strength=0.5), 0),
        (Ask(None), Ask("a", strength=0.0), 39),  # at strength 0 it is the base
        (Ask(None), Ask("top"), 39),  # the last block's output reaches no key and no value
        (Ask("kv prefix"), Ask(None), 0),
        (Ask("kv prefix"), Ask("kv prefix"), 39),
        (Ask("embedded"), Ask("embedded"), 39),
        (Ask(None, tenant="x"), Ask(None, tenant="y"), 0),
        (Ask(None, tenant="x"), Ask(None, tenant="x"), 39),
        (Ask("b", tenant="x"), Ask("b", tenant="y"), 0),
        (Ask(None), Ask(None, HEAD[:20]), 19),
        (Ask(None), Ask(None, HEAD[: LEAST_MATCH - 1] + LONGER[40:]), 0),
    ],
)
def test_what_is_shared(first: Ask, second: Ask, cached: int) -> None:
    engine = make_engine()
    assert answer(engine, first) == (expected(first), 0)
    assert answer(engine, second) == (expected(second), cached)


@pytest.mark.parametrize(
    ("first", "second", "foreign"),
    [
        (Ask(None), Ask(None), 0),
        (Ask("b"), Ask("b", LONGER), 0),
        (Ask(None), Ask("b"), 38),
        (Ask("b"), Ask(None), 38),
        (Ask("b"), Ask("keys"), 36),
        (Ask("kv prefix"), Ask("kv prefix"), 0),
        (Ask(None, tenant="x"), Ask("b", tenant="y"), 0),
    ],
)
@pytest.mark.parametrize("cache_blocks", [64, 0])
def test_tokens_that_others_adapters_left_are_counted(
    first: Ask, second: Ask, foreign: int, cache_blocks: int
) -> None:
    """From the cache, and, where there is none, from a sequence that still runs."""
    engine = make_engine(cache_blocks)
    recorders = [submit(engine, "first", first)]
    for _ in range(2):  # until its prompt is prefilled
        engine.step()
    recorders.append(submit(engine, "second", second))
    finish(engine, *recorders)
    assert engine.stats().foreign_tokens_total == foreign
    assert foreign <= engine.stats().cached_tokens_total


def test_only_what_others_left_is_counted_of_a_mixed_beginning() -> None:
    engine = make_engine()
    answer(engine, Ask(None, HEAD[:32]))  # two blocks of the base model's
    answer(engine, Ask("b"))  # which takes those, and leaves the third
    before = engine.stats()
    assert before.foreign_tokens_total == 32
    answer(engine, Ask("b", LONGER))
    after = engine.stats()
    assert after.cached_tokens_total - before.cached_tokens_total == 38
    assert after.foreign_tokens_total - before.foreign_tokens_total == 32


def test_tokens_of_one_step_are_counted_too() -> None:
    """Three adapters and the base on one prompt, submitted together."""
    engine = make_engine(cache_blocks=0, max_prefill_tokens=64)
    with engine.together():
        names = (None, "b", "keys", "b")
        recorders = [submit(engine, str(i), Ask(name)) for i, name in enumerate(names)]
    finish(engine, *recorders)
    assert engine.stats().cached_tokens_total == 38 + 36 + 40
    assert engine.stats().foreign_tokens_total == 38 + 36  # the second "b" follows the first


@pytest.mark.parametrize(("name", "kept"), [(None, 45), ("b", 38), ("a", 37), ("all", 45)])
def test_the_next_turn_of_a_conversation(name: str | None, kept: int) -> None:
    """It takes over the answer's keys and values too, unless old suffix positions are edited no
    more; then all from the first of those on is computed again."""
    engine = make_engine()
    said, _ = answer(engine, Ask(name))
    turn = Ask(name, (*HEAD, *said, *random_prompt(12, seed=3)))
    assert answer(engine, turn) == (expected(turn), kept)


def test_one_beginning_is_computed_once() -> None:
    """Sixteen adapters on one prompt, all at once: the rest wait for the first."""
    prompt = random_prompt(100, seed=4)
    many = [adapter(name=f"fan-{i}", seed=20 + i, positions="l7") for i in range(16)]
    engine = make_engine(max_num_seqs=16, max_prefill_tokens=64)
    recorders = []
    for i, used in enumerate(many):
        engine.load_adapter(used)
        recorders.append(Recorder())
        request = Request(str(i), prompt, GREEDY, (AdapterChoice(used.digest),))
        engine.submit(request, recorders[-1])
    finish(engine, *recorders)
    for used, recorder in zip(many, recorders, strict=True):
        assert recorder.token_ids == reference_generate(tiny_model(), prompt, MAX_TOKENS, used)
    assert engine.stats().prompt_tokens_total == 100 + 15 * 7


def test_who_waits_goes_on_when_the_first_is_gone() -> None:
    engine = make_engine(max_prefill_tokens=16)
    first, second = submit(engine, "first", Ask(None)), submit(engine, "second", Ask(None))
    engine.step()
    engine.cancel("first")
    finish(engine, first, second)
    assert second.token_ids == expected(Ask(None))
    assert engine.stats().prompt_tokens_total == 40, "what the first had computed was not lost"


def test_the_least_recently_used_go_first_and_ends_before_beginnings() -> None:
    engine = make_engine(cache_blocks=4)
    old, new = Ask(None), Ask(None, random_prompt(30, seed=5))
    answer(engine, old)
    answer(engine, new)  # three blocks each, of four
    assert answer(engine, old) == (expected(old), BLOCK_TOKENS)
    assert engine.stats().cached_blocks <= 4


def test_what_failed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are not finite must not reach the next request with the same prompt."""
    engine = make_engine()
    real = ModelRunner.prefill

    def broken(self: ModelRunner, chunks: Sequence[Chunk]) -> torch.Tensor:
        logits = real(self, chunks)
        for chunk in chunks:
            self._kv.keys[1][chunk.sequence.slot] = torch.nan
        return torch.full_like(logits, torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "prefill", broken)
        recorder = submit(engine, "bad", Ask("b"))
        finish(engine, recorder)
        assert recorder.finish_reason == "error"
    assert answer(engine, Ask("b")) == (expected(Ask("b")), 0)


def test_names_depend_on_everything_before() -> None:
    tokens = list(random_prompt(64, seed=6))
    names = Provenance.of(None, 64).block_names(tokens, 4)
    assert len(set(names)) == 4
    for at in range(64):
        changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
        others = Provenance.of(None, 64).block_names(changed, 4)
        same = [name == other for name, other in zip(names, others, strict=True)]
        assert same == [index < at // BLOCK_TOKENS for index in range(4)]


def test_a_cache_without_room_for_a_block_holds_nothing() -> None:
    kv = SlotKV(tiny_description(), 1, 8, dtype=torch.float32, device="cpu")
    assert PrefixCache(kv, kv.bytes_of(BLOCK_TOKENS) - 1).num_rows == 0

"""The embedded engine's promises: every request ends, alone, and disturbs no other.

Most tests drive :meth:`EmbeddedEngine.step` themselves, so that what happens in which step is
certain; those about the engine's own thread start it.
"""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args

import pytest
import torch
from transformers import PreTrainedModel

import reft_core.batch as batch_module
import reft_core.kernels as kernels_module
from reft_core.adapter import Adapter, EditKey, Prefix, decode_adapter, encode_adapter
from reft_core.engine.attention import DecodeBatch
from reft_core.engine.choices import MAX_STRENGTH
from reft_core.engine.config import EngineConfig, Forward
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.generate import generate
from reft_core.engine.interface import AdapterChoice, Output, Request, SamplingParams
from reft_core.engine.kv import SlotKV
from reft_core.engine.runner import ModelRunner
from reft_core.engine.scheduler import Chunk
from reft_core.engine.sequence import Sequence as EngineSequence
from reft_core.errors import (
    AdapterMismatch,
    DeadlineExceeded,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
)
from tests.factories import (
    VOCAB_SIZE,
    Recorder,
    make_spec,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    shift_adapter,
    tiny_description,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import Stack, reference_generate
from tests.reft_core.engine.stepping import finish, step_until

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
KEYS, VALUES = "linear:self_attn.k_proj", "linear:self_attn.v_proj"
WAIT_S = 20.0
"""Longest a test waits for the engine's thread; it takes milliseconds."""


def greedy(max_tokens: int) -> SamplingParams:
    return replace(GREEDY, max_tokens=max_tokens)


def make_engine(*adapters: Adapter, **config: Any) -> EmbeddedEngine:
    """An engine that is not started, over four slots of 64 tokens unless told otherwise."""
    sizes: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64} | config
    engine = EmbeddedEngine(tiny_loaded(), EngineConfig(**sizes))
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


def test_outputs_of_one_request() -> None:
    """A token each, in order; the last alone carries the reason and the timings."""
    engine = make_engine()
    recorder = Recorder()
    prompt = random_prompt(9)
    ticket = engine.submit(Request("r", prompt, GREEDY), recorder)
    assert (ticket.request_id, ticket.num_prompt_tokens, ticket.num_edits) == ("r", 9, 0)
    assert recorder.outputs == [], "nothing happens before a step"
    finish(engine, recorder)
    assert recorder.token_ids == expected(prompt)
    *early, last = recorder.outputs
    assert all(
        (output.finish_reason, output.error, output.timings) == (None, None, None)
        for output in early
    )
    assert (last.finish_reason, last.error) == ("length", None)
    assert last.timings is not None
    assert min(last.timings.queue_s, last.timings.prefill_s, last.timings.decode_s) >= 0
    assert_idle(engine)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("how", ["stop_token_ids", "eos"])
def test_a_stop_token_ends_and_is_delivered(how: str, at: int) -> None:
    prompt = random_prompt(9, seed=3)
    answer = expected(prompt)
    assert answer.index(answer[at]) == at, "the token must not come earlier"
    engine = make_engine()
    params = replace(GREEDY, stop_token_ids=frozenset({answer[at]}))
    if how == "eos":
        engine._loaded.model.generation_config.eos_token_id = answer[at]
        params = replace(GREEDY, ignore_eos=False)
    stopped = submit(engine, "stopped", prompt, params)
    ignored = submit(engine, "ignored", prompt)
    finish(engine, stopped, ignored)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", answer[: at + 1])
    assert (ignored.finish_reason, ignored.token_ids) == ("length", answer)


@pytest.mark.parametrize("prompt_len", [1, 63])
def test_a_request_may_fill_its_slot_to_the_last_token(prompt_len: int) -> None:
    engine = make_engine(max_prefill_tokens=16)
    prompt, params = random_prompt(prompt_len), greedy(64 - prompt_len)
    recorder = submit(engine, "r", prompt, params)
    finish(engine, recorder)
    assert (recorder.finish_reason, recorder.token_ids) == ("length", expected(prompt, params))


def test_the_contexts_length_is_capped_by_the_models() -> None:
    assert make_engine(max_model_len=100_000).max_model_len == 256


def test_ticket_and_stats_agree_on_the_edits() -> None:
    """Also at strength 0, where the adapter changes nothing."""
    adapter = mild_adapter()
    engine = make_engine(adapter, max_prefill_tokens=3)
    for strength, per_layer in [(None, 4), (2.0, 4), (0.0, 0)]:
        before = engine.stats().edits_applied_total
        recorder = Recorder()
        choice = AdapterChoice(adapter.digest, strength)
        request = Request(f"{strength}", random_prompt(9), GREEDY, (choice,))
        ticket = engine.submit(request, recorder)
        finish(engine, recorder)
        applied = engine.stats().edits_applied_total - before
        # Layers 0 to 2 at four positions; of the last layer's only the last token's lives.
        assert applied == (3 * per_layer + 1 if per_layer else 0)
        assert ticket.num_edits == applied


def test_counters() -> None:
    adapter = mild_adapter()
    engine = make_engine(adapter, max_num_seqs=2, max_prefill_tokens=4)
    recorders = [submit(engine, name, random_prompt(6, ord(name))) for name in "abc"]
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_slots) == (0, 3, 2)
    assert (stats.kv_tokens_used, stats.kv_tokens_capacity) == (0, 2 * 64)
    assert stats.num_resident_adapters == 1
    assert stats.resident_adapter_bytes == adapter.num_bytes
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (4, 0)
    assert (stats.kv_tokens_used, stats.prefill_steps_total) == (4, 1)
    assert stats.decode_steps_total == 0
    engine.step()  # the other two tokens of a, two of b; a's first token, and its second
    stats = engine.stats()
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (8, 2)
    assert (stats.prefill_steps_total, stats.decode_steps_total) == (2, 1)
    assert stats.kv_tokens_used == 7 + 2
    finish(engine, *recorders)
    stats = engine.stats()
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (18, 18)
    assert stats.edits_applied_total == 0
    assert_idle(engine)


def test_seeds_reproduce_whatever_else_is_in_the_batch() -> None:
    """Alone, in a crowd, after it, and with the prompt cut into chunks."""
    adapter = mild_adapter()
    prompt = random_prompt(11, seed=4)

    def sampled(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)

    def crowd(engine: EmbeddedEngine) -> list[Recorder]:
        return [
            submit(engine, f"crowd{i}", random_prompt(5 + i), GREEDY, adapter) for i in range(5)
        ]

    answers = []
    for budget, before, after in [(512, False, False), (512, True, True), (3, True, False)]:
        engine = make_engine(adapter, max_num_seqs=8, max_prefill_tokens=budget)
        others = crowd(engine) if before else []
        engine.step()
        recorder = submit(engine, "seeded", prompt, sampled(7), adapter)
        if after:
            engine.step()
            others += [submit(engine, "late", random_prompt(3), SamplingParams())]
        finish(engine, recorder, *others)
        answers.append(recorder.token_ids)
    assert answers[0] == answers[1] == answers[2]
    engine = make_engine(adapter)
    other = submit(engine, "other seed", prompt, sampled(8), adapter)
    finish(engine, other)
    assert other.token_ids != answers[0]


# What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "cls", "field", "message"),
    [
        (
            Request("r", ()),
            InvalidRequest,
            "prompt",
            "prompt: got (), expected at least one token",
        ),
        *(
            (
                Request("r", (5, token)),
                InvalidRequest,
                "prompt",
                f"prompt: got {token}, expected token ids 0 to {VOCAB_SIZE - 1}",
            )
            for token in (-1, VOCAB_SIZE)
        ),
        (
            Request("r", (5,), SamplingParams(logit_bias={VOCAB_SIZE: 1})),
            InvalidRequest,
            "logit_bias",
            f"logit_bias: got {VOCAB_SIZE}, expected token ids 0 to {VOCAB_SIZE - 1}",
        ),
        (
            Request("r", (5,), SamplingParams(stop_token_ids=frozenset({-1}))),
            InvalidRequest,
            "stop_token_ids",
            f"stop_token_ids: got -1, expected token ids 0 to {VOCAB_SIZE - 1}",
        ),
        (
            Request("r", (5,) * 60, SamplingParams(max_tokens=5)),
            PromptTooLong,
            "prompt",
            "prompt: got 65, expected at most 64 tokens together (60 of prompt and max_tokens 5 "
            "make 65)",
        ),
        (
            Request("r", (5,) * 64, SamplingParams(max_tokens=1)),
            PromptTooLong,
            "prompt",
            "prompt: got 65, expected at most 64 tokens together (64 of prompt and max_tokens 1 "
            "make 65)",
        ),
        (
            Request("r", (5,), GREEDY, (AdapterChoice("f" * 64),)),
            InvalidRequest,
            "adapter",
            f"adapter: got '{'f' * 64}', expected a loaded digest",
        ),
        *(
            (
                using(AdapterChoice(mild_adapter().digest, strength)),
                InvalidRequest,
                "strength",
                f"strength: got {strength}, expected a number from -{MAX_STRENGTH} to "
                f"{MAX_STRENGTH}",
            )
            for strength in (100.1, -1e9, float("inf"), float("nan"))
        ),
        (
            using(AdapterChoice(mild_adapter().digest), AdapterChoice("f" * 64)),
            InvalidRequest,
            "adapter",
            f"adapter: got '{'f' * 64}', expected a loaded digest",
        ),
        (
            using(AdapterChoice(voiced().digest, subspaces={"tone": 1, "mood": 1})),
            InvalidRequest,
            "subspaces",
            "subspaces: got 'mood', expected one of tone, topic, those of 'voiced'",
        ),
        (
            using(AdapterChoice(mild_adapter().digest, subspaces={"tone": 1})),
            InvalidRequest,
            "subspaces",
            "subspaces: got 'tone', expected nothing, as there are none of 'test'",
        ),
        *(
            (
                using(AdapterChoice(voiced().digest, subspaces={"topic": 1, "tone": factor})),
                InvalidRequest,
                "subspaces.tone",
                f"subspaces.tone: got {factor}, expected from -{MAX_STRENGTH} to {MAX_STRENGTH}",
            )
            for factor in (100.1, -1e9, float("inf"), float("nan"))
        ),
        *(
            (
                using(AdapterChoice(prefix(kind).digest, strength)),
                InvalidRequest,
                "strength",
                f"strength: got {strength}, expected 0 or 1, since '{kind}-prefix' brings trained "
                "tokens",
            )
            for kind in ("kv", "embedding")
            for strength in (0.5, 2.0, -1.0)
        ),
        *(
            (
                using(*(AdapterChoice(prefix(kind).digest) for kind in kinds)),
                InvalidRequest,
                "adapters",
                f"adapters: got {[f'{kind}-prefix' for kind in kinds]}, expected at most one "
                "with a prefix",
            )
            for kinds in (("kv", "embedding"), ("kv", "kv"))
        ),
        *(
            (
                Request("r", (5,) * 57, greedy(5), (AdapterChoice(prefix(kind).digest),)),
                PromptTooLong,
                "prompt",
                "prompt: got 65, expected at most 64 tokens together (57 of prompt and "
                "max_tokens 5, 3 of the adapter's prefix make 65)",
            )
            for kind in ("kv", "embedding")
        ),
    ],
)
def test_submit_refuses_what_does_not_fit(
    request_: Request, cls: type[InvalidRequest], field: str, message: str
) -> None:
    engine = make_engine(mild_adapter(), voiced(), prefix("kv"), prefix("embedding"))
    recorder = Recorder()
    with pytest.raises(cls) as caught:
        engine.submit(request_, recorder)
    assert type(caught.value) is cls
    assert caught.value.field == field
    assert str(caught.value) == message
    engine.step()
    assert recorder.outputs == []
    assert_idle(engine)


def test_a_request_id_is_used_once_at_a_time() -> None:
    engine = make_engine()
    first = submit(engine, "r", random_prompt(3))
    with pytest.raises(InvalidRequest, match="request_id: got 'r', expected an unused id"):
        submit(engine, "r", random_prompt(3))
    finish(engine, first)
    again = submit(engine, "r", random_prompt(3))
    finish(engine, again)
    assert again.token_ids == first.token_ids == expected(random_prompt(3))


def test_an_adapter_of_another_model_is_not_loaded() -> None:
    engine = make_engine()
    stranger = random_adapter(replace(tiny_description(), vocab_size=VOCAB_SIZE + 1))
    with pytest.raises(AdapterMismatch, match="vocab_size"):
        engine.load_adapter(stranger)
    assert not engine.has_adapter(stranger.digest)


def test_a_full_queue_refuses_and_recovers() -> None:
    """Two slots and one that waits; the refused one may come back."""
    engine = make_engine(max_num_seqs=2, max_waiting=1)
    open_ = [submit(engine, f"r{i}", random_prompt(4, i)) for i in range(3)]
    for _ in range(2):
        with pytest.raises(EngineOverloaded, match="3 requests are open, at most 3") as caught:
            submit(engine, "late", random_prompt(4))
        assert caught.value.retry_after_s > 0
        engine.step()
    finish(engine, open_[0])
    late = submit(engine, "late", random_prompt(4, 9))
    finish(engine, late, *open_)
    assert late.token_ids == expected(random_prompt(4, 9))
    assert [r.token_ids for r in open_] == [expected(random_prompt(4, i)) for i in range(3)]


# Cancelling -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelling_a_running_request_frees_its_slot(steps: int) -> None:
    """Before its first step, while its prompt is prefilled, and while it decodes."""
    engine = make_engine(max_num_seqs=1, max_prefill_tokens=4)
    recorder = submit(engine, "r", random_prompt(7), greedy(40))
    waiting = submit(engine, "next", random_prompt(5))
    for _ in range(steps):
        engine.step()
    delivered = recorder.token_ids
    engine.cancel("r")
    engine.step()
    assert (
        recorder.token_ids == delivered == expected(random_prompt(7), greedy(40))[: len(delivered)]
    )
    last = recorder.outputs[-1]
    assert (last.finish_reason, last.token, last.error) == ("cancelled", None, None)
    assert last.timings is not None
    assert engine.stats().num_running == 1, "the next took the slot in the same step"
    finish(engine, waiting)
    assert waiting.token_ids == expected(random_prompt(5))
    assert_idle(engine)


def test_cancelling_a_waiting_request_disturbs_nobody() -> None:
    engine = make_engine(max_num_seqs=1)
    running = submit(engine, "running", random_prompt(7))
    waiting = [submit(engine, f"waiting{i}", random_prompt(5, i)) for i in range(3)]
    engine.step()
    engine.cancel("waiting1")
    engine.step()
    assert waiting[1].finish_reason == "cancelled"
    assert engine.stats().num_waiting == 2
    finish(engine, running, *waiting)
    assert running.token_ids == expected(random_prompt(7))
    for index in (0, 2):
        assert waiting[index].token_ids == expected(random_prompt(5, index))
    assert waiting[1].tokens == []
    assert_idle(engine)


def test_cancelling_twice_too_late_or_nothing_is_harmless() -> None:
    engine = make_engine()
    engine.cancel("nobody")
    recorder = submit(engine, "r", random_prompt(3))
    finish(engine, recorder)
    engine.cancel("r")
    again = submit(engine, "r", random_prompt(3))
    engine.cancel("r")
    engine.cancel("r")
    finish(engine, again)
    assert recorder.finish_reason == "length"
    assert [output.finish_reason for output in again.outputs] == ["cancelled"]
    assert_idle(engine)


def test_a_cancellation_does_not_outlive_its_request() -> None:
    """Cancelled by its own sink at its last token; the next request of that id runs."""
    engine = make_engine()
    seen: list[Output] = []

    def sink(output: Output) -> None:
        seen.append(output)
        if output.finish_reason:
            engine.cancel("r")

    engine.submit(Request("r", random_prompt(3), GREEDY), sink)
    step_until(engine, lambda: bool(seen and seen[-1].finish_reason))
    again = submit(engine, "r", random_prompt(3))
    finish(engine, again)
    assert again.token_ids == expected(random_prompt(3))


# One request's failure is its own ---------------------------------------------------------


@pytest.mark.parametrize("raises_at", [1, 2, 6])
def test_a_sink_that_raises_loses_its_own_outputs_alone(raises_at: int) -> None:
    """At its first, an early and its last output."""
    engine = make_engine(max_num_seqs=2)
    calls: list[Output] = []

    def broken(output: Output) -> None:
        calls.append(output)
        if len(calls) >= raises_at:
            raise RuntimeError("client gone")

    engine.submit(Request("broken", random_prompt(6), GREEDY), broken)
    others = [submit(engine, f"r{i}", random_prompt(6, i)) for i in range(3)]
    finish(engine, *others)
    for index, other in enumerate(others):
        assert other.token_ids == expected(random_prompt(6, index))
    assert len(calls) <= raises_at + 2
    assert calls[-1].finish_reason == ("length" if raises_at == 6 else "cancelled")
    assert_idle(engine)
    again = submit(engine, "broken", random_prompt(6))
    finish(engine, again)
    assert again.token_ids == expected(random_prompt(6)), "its id is free again"


LONG, SHORT = random_prompt(24, seed=1), random_prompt(3, seed=2)


def poison_fails(engine: EmbeddedEngine) -> None:
    """Prefilled at once, and refused by the sampler."""
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison())
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)
    assert "not finite" in str(victim.error)
    assert victim.tokens == []


def poison_is_cancelled(engine: EmbeddedEngine) -> None:
    """Half of its prompt is prefilled; nobody has looked at its numbers yet."""
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison())
    step_until(engine, lambda: engine.stats().num_running == 2)
    engine.step()
    engine.cancel("poisoned")
    finish(engine, victim)
    assert victim.finish_reason == "cancelled"


def poison_moves_and_fails(engine: EmbeddedEngine) -> None:
    """Half prefilled it moves into the slot of one that ends, and fails there."""
    first = submit(engine, "first", SHORT, greedy(2))
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison())
    finish(engine, first)
    assert victim.finish_reason is None
    assert engine.stats().num_running == 2
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)


def poison_moves_as_it_fails(engine: EmbeddedEngine) -> None:
    """In the very step that finds it out, one before it ends and it moves there first."""
    first = submit(engine, "first", SHORT, greedy(1))
    victim = submit(engine, "poisoned", random_prompt(5), GREEDY, poison())
    engine.step()
    assert first.finish_reason == "length"
    assert isinstance(victim.error, RequestFailed)


def poison_ends_unseen(engine: EmbeddedEngine) -> None:
    """A sink that raises at the error ends like any other."""

    def broken(output: Output) -> None:
        raise RuntimeError("client gone")

    choice = AdapterChoice(poison().digest)
    request = Request("poisoned", random_prompt(20), GREEDY, (choice,))
    engine.submit(request, broken)
    step_until(engine, lambda: engine.stats().num_waiting + engine.stats().num_running == 1)


def poison_comes_with_its_prefix(engine: EmbeddedEngine) -> None:
    """Its virtual tokens must be zeroed as well."""
    victim = submit(engine, "poisoned", random_prompt(20), GREEDY, poison_of_prefix())
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)
    assert victim.tokens == []


def poison_comes_in_decode(engine: EmbeddedEngine) -> None:
    """Its first token is fine, and its second is NaN, in a batch with the neighbour's."""
    prompt = random_prompt(20)
    victim = submit(engine, "poisoned", prompt, GREEDY, poison_of_decode())
    finish(engine, victim)
    assert isinstance(victim.error, RequestFailed)
    assert victim.token_ids == expected(prompt, greedy(1))


POISONINGS = [
    poison_comes_with_its_prefix,
    poison_comes_in_decode,
    poison_fails,
    poison_is_cancelled,
    poison_moves_and_fails,
    poison_moves_as_it_fails,
    poison_ends_unseen,
]


def run_after_poison(
    way: Callable[[EmbeddedEngine], None], forward: str
) -> tuple[Recorder, list[Recorder]]:
    """A long neighbour that decodes throughout, and short requests in every other slot after."""
    engine = make_engine(
        poison(),
        poison_of_prefix(),
        poison_of_decode(),
        mild_adapter(),
        max_num_seqs=3,
        max_prefill_tokens=8,
        forward=forward,
    )
    neighbour = submit(engine, "neighbour", LONG, greedy(30), mild_adapter())
    step_until(engine, lambda: len(neighbour.tokens) >= 1)
    way(engine)
    assert neighbour.finish_reason is None, "it must still decode beside what follows"
    after = [submit(engine, f"after{i}", SHORT) for i in range(2)]
    finish(engine, neighbour, *after)
    assert_idle(engine)
    return neighbour, after


@pytest.mark.parametrize("forward", get_args(Forward))
@pytest.mark.parametrize("way", POISONINGS)
def test_a_poisonous_adapter_hurts_neither_neighbours_nor_successors(
    way: Callable[[EmbeddedEngine], None], forward: str
) -> None:
    """NaN left in a slot reaches the next request there: attention weighs it 0, and 0·NaN is NaN.

    The neighbour's context is longer than the successors', so their rows attend, masked, over
    what the poisoned request left behind.
    """
    neighbour, after = run_after_poison(way, forward)
    assert neighbour.token_ids == expected(LONG, greedy(30), mild_adapter())
    for successor in after:
        assert successor.error is None, successor.error
        assert successor.token_ids == expected(SHORT)


@pytest.mark.parametrize(
    "way", [poison_fails, poison_comes_with_its_prefix, poison_comes_in_decode]
)
def test_without_clearing_the_poison_would_spread(
    monkeypatch: pytest.MonkeyPatch, way: Callable[[EmbeddedEngine], None]
) -> None:
    """The control of the test above: it can fail, where attention reads what it then masks."""
    monkeypatch.setattr(SlotKV, "clear", lambda self, *_: None)
    neighbour, after = run_after_poison(way, "torch")
    assert neighbour.token_ids == expected(LONG, greedy(30), mild_adapter())
    assert any(successor.token_ids != expected(SHORT) for successor in after)


def test_a_prefill_that_raises_fails_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packed forward is tried again, a request at a time."""
    prefill = ModelRunner.prefill

    def fragile(self: ModelRunner, chunks: Sequence[Chunk]) -> torch.Tensor:
        if any(chunk.sequence.request.request_id == "bad" for chunk in chunks):
            raise RuntimeError("kernel launch failed")
        return prefill(self, chunks)

    monkeypatch.setattr(ModelRunner, "prefill", fragile)
    engine = make_engine(mild_adapter())
    prompts = {name: random_prompt(5 + i, i) for i, name in enumerate(["a", "bad", "c", "d"])}
    adapters = {"a": mild_adapter(), "d": mild_adapter()}
    recorders = {
        name: submit(engine, name, prompt, GREEDY, adapters.get(name))
        for name, prompt in prompts.items()
    }
    finish(engine, *recorders.values())
    bad = recorders.pop("bad")
    assert isinstance(bad.error, RequestFailed)
    assert "kernel launch failed" in str(bad.error)
    assert len(bad.outputs) == 1
    for name, recorder in recorders.items():
        assert recorder.token_ids == expected(prompts[name], GREEDY, adapters.get(name))
    stats = engine.stats()
    assert stats.prompt_tokens_total == sum(len(p) for n, p in prompts.items() if n != "bad")
    assert_idle(engine)


def test_a_decode_that_raises_ends_the_guilty_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is taken apart; neighbours, and one that is still prefilled, are answered."""
    engine = make_engine(max_prefill_tokens=8)
    decoding = {name: submit(engine, name, random_prompt(4, i)) for i, name in enumerate("abc")}
    engine.step()
    engine.step()
    prefilling = submit(engine, "prefilling", LONG)
    real = ModelRunner.decode

    def decode(
        self: ModelRunner, running: Sequence[EngineSequence], only: EngineSequence | None = None
    ) -> torch.Tensor:
        if "b" in [s.request.request_id for s in ([only] if only else running)]:
            raise RuntimeError("out of memory")
        return real(self, running, only)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "decode", decode)
        finish(engine, *decoding.values(), prefilling)
    bad = decoding.pop("b")
    assert isinstance(bad.error, RequestFailed)
    assert "out of memory" in str(bad.error)
    assert prefilling.token_ids == expected(LONG)
    for name, recorder in decoding.items():
        assert recorder.token_ids == expected(random_prompt(4, "abc".index(name)))
    assert_idle(engine)


# Deadlines --------------------------------------------------------------------------------


def test_a_deadline_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting or running; those without one, and those that ended in time, are untouched."""
    engine = make_engine(max_num_seqs=2)
    recorders = {name: Recorder() for name in ("done", "running", "free", "waiting")}
    for name, seconds in (("done", 5.0), ("running", 10.0), ("free", None), ("waiting", 10.0)):
        request = Request(name, SHORT, greedy(1 if name == "done" else 9), deadline_s=seconds)
        engine.submit(request, recorders[name])
    for _ in range(3):
        engine.step()
    later = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later)
    engine.submit(Request("done", SHORT, greedy(2)), again := Recorder())  # its id came back
    finish(engine, again, *recorders.values())
    assert {name: recorder.finish_reason for name, recorder in recorders.items()} == {
        "done": "length",
        "running": "error",
        "free": "length",
        "waiting": "error",
    }
    for name in ("running", "waiting"):
        assert isinstance(recorders[name].error, DeadlineExceeded)
        assert "deadline of 10.0 s" in str(recorders[name].error)
    assert recorders["free"].token_ids == expected(SHORT, greedy(9))
    assert again.finish_reason == "length"
    assert_idle(engine)


def test_a_request_that_has_ended_keeps_nothing_alive() -> None:
    """Its adapter may be unloaded next, and its deadline be minutes away."""
    adapter = random_adapter(tiny_description())
    engine = make_engine(adapter)
    recorder = Recorder()
    choice = AdapterChoice(adapter.digest)
    engine.submit(Request("r", SHORT, greedy(2), (choice,), deadline_s=600.0), recorder)
    finish(engine, recorder)
    resident = weakref.ref(engine._adapters[adapter.digest])
    engine.unload_adapter(adapter.digest)
    gc.collect()
    assert resident() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline_s": 0.0}, "deadline_s: got 0.0, expected a number above 0"),
        ({"deadline_s": float("nan")}, "deadline_s: got nan"),
        ({"priority": 0.5}, "priority: got 0.5, expected a whole number"),
        ({"priority": 10**7}, "priority: got 10000000, expected a whole number from -1000000"),
    ],
)
def test_a_request_checks_its_own_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}"):
        Request("r", SHORT, GREEDY, **options)


# Adapters come and go ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_unloading_does_not_disturb_who_runs(steps: int) -> None:
    """Waiting, in the middle of its prefill, and decoding."""
    adapter = mild_adapter()
    engine = make_engine(adapter, max_prefill_tokens=4)
    recorder = submit(engine, "r", LONG[:9], GREEDY, adapter)
    for _ in range(steps):
        engine.step()
    engine.unload_adapter(adapter.digest)
    engine.unload_adapter(adapter.digest)
    assert not engine.has_adapter(adapter.digest)
    assert engine.stats().num_resident_adapters == 0
    with pytest.raises(InvalidRequest, match="expected a loaded digest"):
        submit(engine, "late", SHORT, GREEDY, adapter)
    finish(engine, recorder)
    assert recorder.token_ids == expected(LONG[:9], GREEDY, adapter)
    assert recorder.token_ids != expected(LONG[:9]), "the adapter must matter"
    engine.load_adapter(adapter)
    engine.load_adapter(adapter)
    assert engine.has_adapter(adapter.digest)
    assert engine.stats().num_resident_adapters == 1


def test_decode_runs_no_edit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook on any module and no call of apply_edits; while prefill has both."""
    apply_edits, forward = kernels_module.apply_edits, ModelRunner._by_transformers
    hooks: dict[str, list[int]] = {"prefill": [], "decode": []}
    applied: list[str] = []
    phase = ""

    def spy_apply(*args: Any) -> None:
        applied.append(phase)
        apply_edits(*args)

    def spy_forward(self: ModelRunner, *args: Any) -> torch.Tensor:
        nonlocal phase
        phase = "decode" if isinstance(args[2], DecodeBatch) else "prefill"
        modules = list(self._model.modules())
        hooks[phase].append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))
        return forward(self, *args)

    engine = make_engine(mild_adapter(), forward="transformers", max_prefill_tokens=8)
    monkeypatch.setattr(kernels_module, "apply_edits", spy_apply)
    monkeypatch.setattr(ModelRunner, "_by_transformers", spy_forward)
    recorders = [submit(engine, f"r{i}", LONG[: 5 + i], GREEDY, mild_adapter()) for i in range(3)]
    finish(engine, *recorders)
    assert hooks["decode"], "there was a decode"
    assert set(hooks["decode"]) == {0}
    assert max(hooks["prefill"]) == 4, "a hook a layer"
    assert set(applied) == {"prefill"}


def count_hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_decode_has_hooks_only_while_an_adapter_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that edits generated tokens, for a while, beside one that does not; its rows alone
    are edited.
    """
    engine = make_engine(everywhere(), mild_adapter(), forward="transformers", max_prefill_tokens=8)
    forward, apply_edits = ModelRunner._by_transformers, kernels_module.apply_edits
    decodes: list[tuple[int, set[int]]] = []
    """Hooks of each decode, and rows it edits."""
    rows: set[int] | None = None

    def spy_apply(hidden: Any, x: Any, edits: Any) -> None:
        if rows is not None:
            for edit in edits:
                rows.update(edit.rows.tolist())
        apply_edits(hidden, x, edits)

    def spy_forward(self: ModelRunner, *args: Any) -> torch.Tensor:
        nonlocal rows
        rows = set() if isinstance(args[2], DecodeBatch) else None
        logits = forward(self, *args)
        if rows is not None:
            decodes.append((count_hooks(self._model), rows))
        return logits

    monkeypatch.setattr(kernels_module, "apply_edits", spy_apply)
    monkeypatch.setattr(ModelRunner, "_by_transformers", spy_forward)
    prompt = LONG[:5]
    quiet = submit(engine, "prompt only", prompt, greedy(12), mild_adapter())
    step_until(engine, lambda: len(quiet.tokens) >= 3)
    assert decodes
    assert set(decodes_of(decodes)) == {0}
    decodes.clear()
    before = engine.stats().edits_applied_total
    loud = submit(engine, "all", prompt, greedy(4), everywhere())
    off = submit(engine, "off", prompt, greedy(4), everywhere(), 0.0)
    finish(engine, loud, off)
    edited, rest = decodes[:3], decodes[3:]
    assert edited == [(4, {1})] * 3, "a hook a layer, and its row alone"
    assert set(decodes_of(rest)) <= {0}, "it has ended, and the one at strength 0 has not"
    applied = engine.stats().edits_applied_total - before
    assert applied == 4 * 5 + 4 * 3, "in four layers: five prompt tokens and three generated"
    decodes.clear()
    finish(engine, quiet)
    assert decodes
    assert set(decodes_of(decodes)) == {0}
    assert quiet.token_ids == expected(prompt, greedy(12), mild_adapter())
    assert loud.token_ids == expected(prompt, greedy(4), everywhere())
    assert off.token_ids == expected(prompt, greedy(4))
    site = everywhere().spec.sites[VALUES].model_copy(update={"phase": "prompt"})
    spec = everywhere().spec.model_copy(update={"sites": {VALUES: site}})
    prompt_only = replace(everywhere(), spec=spec)
    assert loud.token_ids != expected(prompt, greedy(4), prompt_only), "the phase must matter"


def decodes_of(decodes: list[tuple[int, set[int]]]) -> list[int]:
    """Their numbers of hooks."""
    return [hooks for hooks, _ in decodes]


def test_an_idle_row_gets_no_decode_edit() -> None:
    """Half prefilled, it moves into a slot before one that decodes, so it is in their batch."""
    engine = make_engine(everywhere(), max_prefill_tokens=4, max_num_seqs=3)
    lengths = (4, 20)
    ready = [submit(engine, f"r{n}", LONG[n : n + 2], greedy(n), everywhere()) for n in lengths]
    step_until(engine, lambda: all(recorder.tokens for recorder in ready))
    long = submit(engine, "long", LONG, greedy(6), everywhere())
    finish(engine, ready[0])
    assert long.tokens == []
    assert [s.request.request_id for s in engine._scheduler.running] == ["long", "r20"]
    finish(engine, long, *ready)
    assert long.token_ids == expected(LONG, greedy(6), everywhere())
    for recorder, n in zip(ready, lengths, strict=True):
        assert recorder.token_ids == expected(LONG[n : n + 2], greedy(n), everywhere())
    # Four layers, each prompt token, and each generated one but the last.
    assert engine.stats().edits_applied_total == 4 * (24 + 5) + 4 * (2 + 3) + 4 * (2 + 19)


# Which edits are left out -----------------------------------------------------------------


def last_layer_adapter(method: str, site: str) -> Adapter:
    return random_adapter(
        tiny_description(),
        method=method,
        sites=(site,),
        rank=8,
        layers=[3],
        positions="prompt",
        phase="prompt",
        size=5.0,
    )


RESIDUAL = ["block_output", "attn_output", "mlp_output", "heads"]


def answer_of(adapter: Adapter) -> tuple[list[int], int]:
    """Greedy tokens of LONG under the adapter, and the number of edits."""
    engine = make_engine(adapter)
    recorder = Recorder()
    ticket = engine.submit(
        Request("r", LONG, greedy(12), (AdapterChoice(adapter.digest),)), recorder
    )
    finish(engine, recorder)
    return recorder.token_ids, ticket.num_edits


@pytest.mark.parametrize("site", RESIDUAL)
def test_dead_edits_of_the_last_layer_are_left_out_unseen(
    monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    """One edit gives what all of them give; the reference makes them all."""
    adapter = last_layer_adapter("loreft", site)
    wanted = expected(LONG, greedy(12), adapter)
    assert wanted != expected(LONG, greedy(12)), "the live one must matter"
    assert answer_of(adapter) == (wanted, 1)
    monkeypatch.setattr(batch_module, "_READ_BY_LOGITS_ONLY", ())
    assert answer_of(adapter) == (wanted, len(LONG))


@pytest.mark.parametrize("site", [KEYS, VALUES])
def test_keys_and_values_of_the_last_layer_are_read_by_later_tokens(
    monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    """None of their edits is dead; were they left out, the answer would change."""
    adapter = last_layer_adapter("lora", site)
    wanted = expected(LONG, greedy(12), adapter)
    assert answer_of(adapter) == (wanted, len(LONG))
    monkeypatch.setattr(batch_module, "_READ_BY_LOGITS_ONLY", (*RESIDUAL, site))
    pruned, num_edits = answer_of(adapter)
    assert num_edits == 1
    assert pruned != wanted


# Stacks, subspaces, prefixes --------------------------------------------------------------


def expected_of(stack: Stack, prompt: Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
    return reference_generate(reference_model(), tuple(prompt), params.max_tokens, stack=stack)


def submit_stack(
    engine: EmbeddedEngine,
    name: str,
    stack: Stack,
    prompt: Sequence[int],
    params: SamplingParams = GREEDY,
) -> Recorder:
    recorder = Recorder()
    choices = tuple(AdapterChoice(adapter.digest, strength) for adapter, strength in stack)
    engine.submit(Request(name, tuple(prompt), params, choices), recorder)
    return recorder


@pytest.mark.parametrize("max_prefill_tokens", [512, 5])
def test_a_stack_acts_in_its_order(max_prefill_tokens: int) -> None:
    """[A, B] and [B, A], which do not commute, in one batch with both alone and A twice; and
    [C, A], whose second was second before its first was first.
    """
    one, two, three = (
        random_adapter(tiny_description(), seed=seed, rank=8, positions="prompt", size=2.0)
        for seed in (1, 2, 3)
    )
    stacks: dict[str, Stack] = {
        "ab": [(one, 1.0), (two, 1.0)],
        "ba": [(two, 1.0), (one, 1.0)],
        "ca": [(three, 1.0), (one, 1.0)],
        "a": [(one, 1.0)],
        "b": [(two, 1.0)],
        "aa": [(one, 1.0), (one, 1.0)],
        "a0b": [(one, 0.0), (two, 1.0)],
        "": [],
    }
    engine = make_engine(one, two, three, max_num_seqs=8, max_prefill_tokens=max_prefill_tokens)
    recorders = {
        name: submit_stack(engine, name, stack, LONG[:9]) for name, stack in stacks.items()
    }
    finish(engine, *recorders.values())
    answers = {name: recorder.token_ids for name, recorder in recorders.items()}
    for name, stack in stacks.items():
        assert answers[name] == expected_of(stack, LONG[:9]), name
    assert answers["a0b"] == answers["b"]
    different = [tuple(answers[name]) for name in ("ab", "ba", "ca", "a", "b", "aa", "")]
    assert len(set(different)) == len(different), "the order must matter"


def test_subspaces_leave_only_the_chosen_ranks() -> None:
    """Beside requests of the same adapter that choose otherwise; the file's up-rows, scaled by
    hand, tell what is right.
    """

    def by_hand(factors: list[float]) -> Adapter:
        edits = {}
        for key, edit in voiced().edits.items():
            assert edit.up is not None
            edits[key] = replace(edit, up=edit.up * torch.tensor(factors).unsqueeze(1))
        return replace(voiced(), edits=edits)

    cases: list[tuple[dict[str, float], list[float]]] = [
        ({}, [1, 1, 1, 1]),
        ({"tone": 1, "topic": 1}, [1, 1, 1, 1]),
        ({"tone": 1}, [1, 0, 1, 0]),
        ({"topic": 1}, [0, 1, 0, 1]),
        ({"topic": -2, "tone": 0.5}, [0.5, -2, 0.5, -2]),
        ({"tone": 0}, [0, 0, 0, 0]),
    ]
    engine = make_engine(voiced(), max_num_seqs=len(cases))
    recorders = []
    for index, (chosen, _) in enumerate(cases):
        recorder = Recorder()
        choice = AdapterChoice(voiced().digest, subspaces=chosen)
        engine.submit(Request(f"r{index}", LONG[:9], GREEDY, (choice,)), recorder)
        recorders.append(recorder)
    finish(engine, *recorders)
    answers = [recorder.token_ids for recorder in recorders]
    for answer, (chosen, factors) in zip(answers, cases, strict=True):
        assert answer == expected(LONG[:9], GREEDY, by_hand(factors)), chosen
    assert answers[0] == answers[1]
    assert answers[5] == expected(LONG[:9])
    assert len({tuple(answer) for answer in answers}) == 5, "each choice must matter"


@pytest.mark.parametrize("name", ["kv", "embedding", "mam"])
def test_a_prefix_at_strength_0_is_exactly_the_base(name: str) -> None:
    """Also beside the same adapter at strength 1, and in a stack with another prefix."""
    adapter = mam() if name == "mam" else prefix(name)  # type: ignore[arg-type]
    other = random_prefix_adapter(tiny_description(), "kv", length=2, seed=1)
    engine = make_engine(adapter, other, everywhere())
    stacks: list[Stack] = [
        [(adapter, 0.0)],
        [(adapter, 1.0)],
        [(other, 1.0), (adapter, 0.0)],
        [(adapter, 0.0), (everywhere(), 1.0)],
    ]
    recorders = [submit_stack(engine, f"r{i}", stack, LONG[:9]) for i, stack in enumerate(stacks)]
    ticket = engine.submit(
        Request("long", (5,) * 58, greedy(6), (AdapterChoice(adapter.digest, 0.0),)), Recorder()
    )
    finish(engine, *recorders)
    assert ticket.num_edits == 0, "and its tokens take no room"
    answers = [recorder.token_ids for recorder in recorders]
    assert answers[0] == expected(LONG[:9])
    assert answers[1] == expected(LONG[:9], GREEDY, adapter) != answers[0]
    assert answers[2] == expected(LONG[:9], GREEDY, other)
    assert answers[3] == expected(LONG[:9], GREEDY, everywhere())


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("prompt_len", [1, 60])
def test_a_prefixed_request_may_fill_its_slot_to_the_last_token(
    kind: Literal["kv", "embedding"], prompt_len: int
) -> None:
    """Three virtual tokens, the prompt and the answer make 64. The ticket counts the prompt."""
    engine = make_engine(prefix(kind), max_prefill_tokens=16)
    prompt, params = random_prompt(prompt_len), greedy(61 - prompt_len)
    recorder = Recorder()
    choice = AdapterChoice(prefix(kind).digest)
    ticket = engine.submit(Request("r", prompt, params, (choice,)), recorder)
    assert (ticket.num_prompt_tokens, ticket.num_edits) == (prompt_len, 0)
    finish(engine, recorder)
    assert recorder.token_ids == expected(prompt, params, prefix(kind))
    if prompt_len == 1:
        assert recorder.token_ids != expected(prompt, params), "the prefix must matter"
    assert_idle(engine)


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("max_prefill_tokens", [512, 2])
def test_one_adapter_may_bring_both_a_prefix_and_edits(
    kind: Literal["kv", "embedding"], max_prefill_tokens: int
) -> None:
    """As mix-and-match adapters do; also stacked with another's edits."""
    edits = random_adapter(tiny_description(), rank=4, positions="f2+l2", size=2.0)
    spec = make_spec(tiny_description(), rank=4, positions="f2+l2", prefix=prefix(kind).spec.prefix)
    both = decode_adapter(encode_adapter(spec, edits.edits, prefix(kind).prefix))
    engine = make_engine(both, mild_adapter(), max_prefill_tokens=max_prefill_tokens)
    stacks: list[Stack] = [
        [(both, 1.0)],
        [(mild_adapter(), 0.5), (both, 1.0)],
        [(both, 1.0), (mild_adapter(), -1.0)],
        [(mild_adapter(), 1.0)],
    ]
    recorders = [
        submit_stack(engine, f"r{i}", stack, LONG[: 7 + i]) for i, stack in enumerate(stacks)
    ]
    finish(engine, *recorders)
    for i, (stack, recorder) in enumerate(zip(stacks, recorders, strict=True)):
        assert recorder.token_ids == expected_of(stack, LONG[: 7 + i])
    assert recorders[0].token_ids != expected(LONG[:7], GREEDY, prefix(kind))


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_repetition_penalty_ignores_virtual_tokens(kind: Literal["kv", "embedding"]) -> None:
    """Their places hold token 0, which this model is made to answer."""
    params = replace(greedy(1), logit_bias={0: 100}, repetition_penalty=10, logprobs=0)
    engine = make_engine(prefix(kind))
    virtual, seen = (
        submit(engine, name, prompt, params, prefix(kind))
        for name, prompt in [("virtual", (5, 6)), ("seen", (0, 6))]
    )
    finish(engine, virtual, seen)
    assert virtual.token_ids == [0]
    assert seen.token_ids == [0], "a tenth of 100 is still the most"
    params = replace(params, logit_bias={0: 100, 1: 50})
    virtual, seen = (
        submit(engine, name, prompt, params, prefix(kind))
        for name, prompt in [("virtual", (5, 6)), ("seen", (0, 6))]
    )
    finish(engine, virtual, seen)
    assert virtual.token_ids == [0]
    assert seen.token_ids == [1]


def test_loading_folds_what_decoding_left() -> None:
    """A file may hold a scale and a skip; the form that serves has neither."""
    adapter = mild_adapter()
    halves = {
        key: replace(edit, scale=2.0, up=edit.up / 2)
        for key, edit in adapter.edits.items()
        if edit.up is not None
    }
    site = adapter.spec.sites["block_output"].model_copy(update={"scale": 2.0})
    spec = adapter.spec.model_copy(update={"sites": {"block_output": site}})
    scaled = decode_adapter(encode_adapter(spec, halves))
    assert scaled.edits[EditKey(0, "block_output", 0)].scale == 2.0
    engine = make_engine(scaled)
    assert {edit.scale for edit in engine._adapters[scaled.digest].edits.values()} == {1.0}
    recorder = submit(engine, "r", LONG[:9], GREEDY, scaled)
    finish(engine, recorder)
    assert recorder.token_ids == expected(LONG[:9], GREEDY, adapter)


# Starting, draining, stopping, dying ------------------------------------------------------


def test_requests_wait_for_the_start() -> None:
    engine = make_engine()
    done = threading.Event()
    recorder = Recorder()

    def sink(output: Output) -> None:
        recorder(output)
        if output.finish_reason:
            done.set()

    engine.submit(Request("r", SHORT, GREEDY), sink)
    with started(engine):
        assert done.wait(WAIT_S)
    assert recorder.token_ids == expected(SHORT)


def test_draining_refuses_new_requests_and_finishes_the_old() -> None:
    engine = make_engine()
    recorder = submit(engine, "r", SHORT)
    assert engine.drain(timeout_s=0) is False, "it is still open"
    with pytest.raises(EngineUnavailable, match="shutting down"):
        submit(engine, "late", SHORT)
    assert engine.healthy
    with started(engine):
        assert engine.drain(WAIT_S) is True
        assert recorder.token_ids == expected(SHORT)
        with pytest.raises(EngineUnavailable):
            submit(engine, "late", SHORT)


def test_draining_an_idle_engine_takes_no_time() -> None:
    assert make_engine().drain(timeout_s=0) is True


def test_stopping_ends_every_open_request() -> None:
    """One that runs and one that waits; both learn why."""
    engine = make_engine(max_num_seqs=1, max_model_len=256)
    first_token = threading.Event()
    running = Recorder()

    def sink(output: Output) -> None:
        running(output)
        first_token.set()

    engine.submit(Request("running", SHORT, greedy(250)), sink)
    waiting = submit(engine, "waiting", SHORT)
    engine.start()
    assert first_token.wait(WAIT_S)
    engine.stop()
    for recorder in (running, waiting):
        last = recorder.outputs[-1]
        assert last.finish_reason == "error"
        assert isinstance(last.error, EngineUnavailable)
        assert "stopped" in str(last.error)
        assert sum(output.finish_reason is not None for output in recorder.outputs) == 1
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        submit(engine, "late", SHORT)
    assert engine.drain(timeout_s=0) is True, "nothing is open"
    engine.stop()
    assert waiting.tokens == []


def test_stopping_an_engine_that_never_started() -> None:
    engine = make_engine()
    recorder = submit(engine, "r", SHORT)
    engine.stop()
    assert isinstance(recorder.error, EngineUnavailable)


# The engine's thread raises on, which is how its death reaches the process's log.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_accepted_while_the_engine_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    first = submit(engine, "first", SHORT)
    stepping, dying = threading.Event(), threading.Event()

    def dying_step() -> None:
        stepping.set()
        assert dying.wait(WAIT_S)
        raise MemoryError("out of memory")

    monkeypatch.setattr(engine, "step", dying_step)
    engine.start()
    assert stepping.wait(WAIT_S)
    with engine.together():  # the lock under which a request is accepted
        dying.set()
        late = submit(engine, "late", SHORT)
    assert engine._thread is not None
    engine._thread.join(WAIT_S)
    assert [type(recorder.error) for recorder in (first, late)] == [EngineUnavailable] * 2
    assert engine.drain(WAIT_S)


# The engine's thread raises on, which is how its death reaches the process's log.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_says_so_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_num_seqs=1)
    recorders = [submit(engine, f"r{i}", SHORT, greedy(50)) for i in range(3)]
    steps = 0

    def dying_step() -> None:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise MemoryError("out of memory")
        EmbeddedEngine.step(engine)

    monkeypatch.setattr(engine, "step", dying_step)
    assert engine.healthy
    engine.start()
    assert engine._thread is not None
    engine._thread.join(WAIT_S)
    assert not engine._thread.is_alive()
    assert not engine.healthy
    for recorder in recorders:
        assert isinstance(recorder.error, EngineUnavailable)
        assert "out of memory" in str(recorder.error)
    assert recorders[0].token_ids == expected(SHORT, greedy(50))[: len(recorders[0].tokens)]
    assert recorders[0].tokens, "it ran before the engine died"
    with pytest.raises(EngineUnavailable):
        submit(engine, "late", SHORT)
    engine.cancel("r0")
    engine.stop()
    assert [len(r.outputs) - len(r.tokens) for r in recorders] == [1, 1, 1]


def test_many_threads_submit_and_cancel_at_once() -> None:
    """Every request ends exactly once, whatever its neighbours do."""
    engine = make_engine(mild_adapter(), max_num_seqs=3, max_prefill_tokens=8)
    answers = {True: expected(SHORT, GREEDY, mild_adapter()), False: expected(SHORT)}
    recorders: dict[str, Recorder] = {}
    with started(engine):

        def client(number: int) -> None:
            for i in range(6):
                name = f"{number}-{i}"
                adapter = mild_adapter() if i % 2 else None
                recorders[name] = submit(engine, name, SHORT, GREEDY, adapter)
                if i % 3 == 2:
                    engine.cancel(name)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert engine.drain(WAIT_S)
    assert len(recorders) == 30
    for name, recorder in recorders.items():
        i = int(name[-1])
        assert sum(output.finish_reason is not None for output in recorder.outputs) == 1
        if i % 3 == 2:
            assert recorder.finish_reason in ("cancelled", "length")
            assert recorder.token_ids == answers[bool(i % 2)][: len(recorder.tokens)]
        else:
            assert recorder.token_ids == answers[bool(i % 2)], name
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)


# generate() -------------------------------------------------------------------------------


def test_generate_keeps_order_and_waits_when_the_queue_is_full() -> None:
    engine = make_engine(mild_adapter(), max_num_seqs=2, max_waiting=1)
    choices = (AdapterChoice(mild_adapter().digest),)
    requests = [Request(f"r{i}", LONG[: 4 + i], greedy(3 + i % 3), choices) for i in range(8)]
    with started(engine):
        completions = generate(engine, requests)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.token_ids == expected(request.prompt, request.params, mild_adapter())
        assert completion.finish_reason == "length"
        assert completion.num_edits == 3 * 4 + 1
        assert completion.timings is not None


def test_generate_raises_a_requests_error_and_cancels_the_rest() -> None:
    engine = make_engine(poison())
    requests = [Request(f"r{i}", LONG, greedy(30)) for i in range(3)]
    requests.insert(1, Request("bad", LONG, GREEDY, (AdapterChoice(poison().digest),)))
    with started(engine):
        with pytest.raises(RequestFailed, match="not finite"):
            generate(engine, requests)
        with pytest.raises(InvalidRequest, match="at least one token"):
            generate(engine, [Request("a", SHORT, greedy(30)), Request("b", ())])
        assert engine.drain(WAIT_S)
    assert engine.stats().num_running == 0

"""The embedded engine's promises: every request ends, alone, and disturbs no other.

Most tests drive :meth:`EmbeddedEngine.step` themselves, so that what happens in which step is
certain; those about the engine's own thread start it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from reft_core.engine.choices import MAX_STRENGTH
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Output, Request, SamplingParams
from reft_core.errors import (
    AdapterMismatch,
    EngineOverloaded,
    InvalidRequest,
    PromptTooLong,
)
from tests.factories import (
    VOCAB_SIZE,
    Recorder,
    random_adapter,
    random_prompt,
    tiny_description,
)
from tests.reft_core.engine.engines import (
    GREEDY,
    SHORT,
    assert_idle,
    expected,
    greedy,
    make_engine,
    mild_adapter,
    prefix,
    submit,
    using,
    voiced,
)
from tests.reft_core.engine.stepping import finish, step_until


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

"""What any engine promises its callers: every request ends, alone, and disturbs no other."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from reft_core.engine.interface import AdapterChoice, Output, Request, SamplingParams
from reft_core.errors import (
    AdapterMismatch,
    DeadlineExceeded,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
)
from tests.conformance.lab import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    MAX_WAITING,
    WAIT_S,
    Lab,
    Sink,
    greedy,
)
from tests.factories import Recorder, random_adapter, random_prompt, shift_adapter

SHORT = random_prompt(5)
LONG_ANSWER = greedy(450)
"""Takes so many steps that a test can act before the end."""


@pytest.mark.parametrize(
    ("fields", "cls", "message"),
    [
        ({"prompt": ()}, InvalidRequest, "prompt: got (), expected at least one token"),
        ({"prompt": (5, 96)}, InvalidRequest, "prompt: got 96, expected token ids 0 to 95"),
        (
            {"params": SamplingParams(logit_bias={96: 1})},
            InvalidRequest,
            "logit_bias: got 96, expected token ids 0 to 95",
        ),
        (
            {"params": SamplingParams(stop_token_ids=frozenset({-1}))},
            InvalidRequest,
            "stop_token_ids: got -1, expected token ids 0 to 95",
        ),
        (
            {"completion": (999999,)},
            InvalidRequest,
            "completion: got 999999, expected token ids 0 to 95",
        ),
        (
            {"prompt": (5,) * MAX_MODEL_LEN, "params": greedy(1)},
            PromptTooLong,
            "prompt: got 513, expected at most 512 tokens together (512 of prompt and max_tokens 1 "
            "make 513)",
        ),
        (
            {"adapters": (AdapterChoice("f" * 64),)},
            InvalidRequest,
            f"adapter: got '{'f' * 64}', expected a loaded digest",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    lab: Lab, fields: dict[str, Any], cls: type[InvalidRequest], message: str
) -> None:
    sink = Sink()
    with pytest.raises(cls) as caught:
        lab.engine.submit(Request(**({"request_id": "bad", "prompt": SHORT} | fields)), sink)
    assert (type(caught.value), str(caught.value)) == (cls, message)
    assert sink.outputs == []
    assert lab.run(SHORT, greedy(2), request_id="bad").token_ids == lab.expected(SHORT, 2)


def test_an_adapters_options_are_checked(lab: Lab) -> None:
    lab.load("last")
    for options, message in [
        ({"strength": 100.1}, "strength: got 100.1, expected a number from -100.0 to 100.0"),
        ({"subspaces": {"tone": 1}}, "subspaces: got 'tone', expected nothing"),
        ({"source": (5, 6)}, "source: got '2 tokens', expected none"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            lab.submit(SHORT, greedy(1), lab.choice("last", **options))
        assert str(caught.value).startswith(message)


def test_a_request_id_is_used_once_at_a_time(lab: Lab) -> None:
    _, first = lab.submit(SHORT, LONG_ANSWER, request_id="once")
    with pytest.raises(InvalidRequest, match="request_id: got 'once', expected an unused id"):
        lab.submit(SHORT, greedy(1), request_id="once")
    lab.engine.cancel("once")
    first.wait()
    assert lab.run(SHORT, greedy(2), request_id="once").token_ids == lab.expected(SHORT, 2)


def test_a_full_queue_refuses_and_recovers(lab: Lab) -> None:
    most = MAX_NUM_SEQS + MAX_WAITING
    with lab.engine.together():
        open_ = [lab.submit(random_prompt(4, i), greedy(3))[1] for i in range(most)]
        with pytest.raises(EngineOverloaded, match=f"{most} requests are open, at most {most}"):
            lab.submit(SHORT, greedy(3))
    for number, sink in enumerate(open_):
        assert sink.wait().token_ids == lab.expected(random_prompt(4, number), 3)
    assert lab.run(SHORT, greedy(3)).token_ids == lab.expected(SHORT, 3)


@pytest.mark.parametrize("after", [0, 3])
def test_cancelling_ends_a_request_alone(lab: Lab, after: int) -> None:
    ticket, sink = lab.submit(SHORT, LONG_ANSWER)
    _, other = lab.submit(random_prompt(9), greedy(12))
    if after:
        sink.wait(after)
    lab.engine.cancel(ticket.request_id)
    sink.wait()
    last = sink.outputs[-1]
    assert (last.finish_reason, last.token, last.error) == ("cancelled", None, None)
    assert last.timings is not None
    assert len(sink.tokens) < 450
    assert sink.token_ids == lab.expected(SHORT, len(sink.tokens))
    assert other.wait().token_ids == lab.expected(random_prompt(9), 12)
    lab.engine.cancel(ticket.request_id)
    lab.engine.cancel("never heard of")


def test_cancelling_who_waits_disturbs_nobody(lab: Lab) -> None:
    running = [lab.submit(random_prompt(6, i), greedy(25))[1] for i in range(MAX_NUM_SEQS)]
    waiting = [lab.submit(random_prompt(6, 10 + i), greedy(25)) for i in range(3)]
    lab.engine.cancel(waiting[1][0].request_id)
    assert waiting[1][1].wait().finish_reason == "cancelled"
    for number, sink in enumerate(running):
        assert sink.wait().token_ids == lab.expected(random_prompt(6, number), 25)
    for number in (0, 2):
        assert waiting[number][1].wait().finish_reason == "length"


@pytest.mark.parametrize("deadline_s", [1e-6, 0.05])
def test_a_deadline_ends_its_request_alone(lab: Lab, deadline_s: float) -> None:
    _, other = lab.submit(random_prompt(7), greedy(10))
    sink = lab.run(SHORT, LONG_ANSWER, deadline_s=deadline_s)
    assert sink.finish_reason == "error"
    assert isinstance(sink.error, DeadlineExceeded)
    assert f"{deadline_s} s" in str(sink.error)
    assert other.wait().finish_reason == "length"
    in_time = lab.run(SHORT, greedy(3), deadline_s=WAIT_S)
    assert in_time.token_ids == lab.expected(SHORT, 3)


def test_a_sink_that_raises_loses_its_own_outputs_alone(lab: Lab) -> None:
    calls = []

    def broken(output: Output) -> None:
        calls.append(output)
        raise ValueError("a bug of the caller's")

    lab.engine.submit(Request("broken", SHORT, LONG_ANSWER), broken)
    assert lab.run(random_prompt(8), greedy(8)).token_ids == lab.expected(random_prompt(8), 8)
    while lab.engine.stats().num_running:  # until it is cancelled
        lab.run(SHORT, greedy(1))
    assert len(calls) < 450


def test_the_priority_does_not_change_the_answer(lab: Lab) -> None:
    sinks = [lab.submit(SHORT, greedy(4), priority=p)[1] for p in (5, -5, 0)]
    assert {tuple(sink.wait().token_ids) for sink in sinks} == {tuple(lab.expected(SHORT, 4))}


def test_tenants_do_not_share_what_their_prompts_leave(lab: Lab) -> None:
    prompt = random_prompt(150, seed=21)
    cached = [
        lab.run(prompt, greedy(1), tenant=tenant).outputs[0].num_cached_tokens
        for tenant in ("one", "one", "other")
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 96


def test_many_threads_submit_and_cancel_at_once(lab: Lab) -> None:
    """Every request ends exactly once, whatever its neighbours do."""
    lab.load("last")
    answers = [lab.expected(SHORT, 6), lab.expected(SHORT, 6, ("last", 1.0))]
    ended: dict[str, Sink] = {}

    def client(number: int) -> None:
        for i in range(4):
            choices = [lab.choice("last")] * (i % 2)
            name = f"crowd-{number}-{i}"
            _, ended[name] = lab.submit(SHORT, greedy(6), *choices, request_id=name)
            if i == 2:
                lab.engine.cancel(name)
            else:
                ended[name].wait()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(ended) == 16
    for name, sink in ended.items():
        i = int(name[-1])
        sink.wait()
        assert sum(output.finish_reason is not None for output in sink.outputs) == 1
        if i == 2:
            assert sink.token_ids == answers[0][: len(sink.tokens)]
        else:
            assert sink.token_ids == answers[i % 2], name


# Adapters come and go -----------------------------------------------------------------------


def test_unloading_does_not_disturb_who_runs(lab: Lab) -> None:
    lab.load("bent")
    prompt, choice = random_prompt(30, seed=14), lab.choice("bent")
    _, running = lab.submit(prompt, greedy(60), choice)
    lab.engine.unload_adapter(choice.digest)
    assert not lab.engine.has_adapter(choice.digest)
    with pytest.raises(InvalidRequest, match="expected a loaded digest"):
        lab.submit(prompt, greedy(1), choice)
    with pytest.raises(InvalidRequest, match="expected a loaded digest"):
        lab.engine.adapter_spec(choice.digest)
    assert running.wait().token_ids == lab.expected(prompt, 60, ("bent", 1.0))
    lab.engine.unload_adapter(choice.digest)  # no-op
    lab.load("bent")
    lab.load("bent")  # no-op
    assert lab.engine.adapter_spec(choice.digest) == lab.adapters["bent"].spec
    assert lab.run(prompt, greedy(6), choice).token_ids == lab.expected(prompt, 6, ("bent", 1.0))


def test_an_adapter_taken_away_and_brought_back_while_it_is_used(lab: Lab) -> None:
    lab.load("listed")
    prompt, choice = random_prompt(30, seed=15), lab.choice("listed")
    _, running = lab.submit(prompt, greedy(40), choice)
    lab.engine.unload_adapter(choice.digest)
    lab.load("listed")
    assert lab.run(prompt, greedy(6), choice).token_ids == lab.expected(prompt, 6, ("listed", 1.0))
    assert running.wait().token_ids == lab.expected(prompt, 40, ("listed", 1.0))
    assert lab.run(prompt, greedy(6), choice).token_ids == running.token_ids[:6]


def test_an_adapter_of_another_model_is_not_loaded(lab: Lab) -> None:
    stranger = random_adapter(replace(lab.world.description, vocab_size=97))
    with pytest.raises(AdapterMismatch, match="vocab_size"):
        lab.engine.load_adapter(stranger)
    assert not lab.engine.has_adapter(stranger.digest)


def test_a_poisonous_adapter_hurts_neither_neighbours_nor_successors(lab: Lab) -> None:
    """Finite numbers that overflow float32 at every prompt token."""
    poison = shift_adapter(lab.world.description, shift=3e38, gain=3e38)
    lab.engine.load_adapter(poison)
    prompt = random_prompt(34, seed=16)
    _, neighbour = lab.submit(prompt, greedy(20))
    poisoned = lab.run(prompt, greedy(20), AdapterChoice(poison.digest))
    assert (poisoned.finish_reason, poisoned.tokens) == ("error", [])
    assert isinstance(poisoned.error, RequestFailed)
    assert neighbour.wait().token_ids == lab.expected(prompt, 20)
    assert lab.run(prompt, greedy(6)).token_ids == lab.expected(prompt, 6)


def test_counters_and_gauges(lab: Lab) -> None:
    lab.load("last")
    before = lab.engine.stats()
    _, sink = lab.submit(random_prompt(40, seed=17), greedy(7), lab.choice("last"), tenant="count")
    sink.wait()
    while (stats := lab.engine.stats()).num_running:
        lab.run(SHORT, SamplingParams(max_tokens=0))
    assert (stats.num_waiting, stats.num_slots) == (0, MAX_NUM_SEQS)
    assert stats.generated_tokens_total >= before.generated_tokens_total + 7
    assert stats.prompt_tokens_total >= before.prompt_tokens_total + 40
    assert stats.edits_applied_total == before.edits_applied_total + 4
    assert stats.decode_steps_total > before.decode_steps_total
    assert stats.prefill_steps_total > before.prefill_steps_total
    assert stats.num_resident_adapters >= 1
    assert stats.resident_adapter_bytes > 0
    assert stats.kv_tokens_capacity >= MAX_MODEL_LEN
    assert stats.kv_tokens_used <= stats.kv_tokens_capacity
    model = lab.world.description
    assert stats.kv_token_bytes == 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim


def test_counters_are_of_what_was_read_and_delivered(lab: Lab) -> None:
    """Of prompts alone, whether computed or known, and of no token that nobody was shown."""
    lab.load("last")
    prompt, choice = random_prompt(70, seed=18), lab.choice("last")
    before = lab.engine.stats()
    lab.run(prompt, greedy(5), choice)
    lab.run(prompt, greedy(0), choice)
    lab.run(prompt, greedy(0, prompt_logprobs=0), choice)
    lab.run(prompt, greedy(1), choice, completion=(3, 5, 2))
    after = lab.engine.stats()
    assert after.generated_tokens_total - before.generated_tokens_total == 5 + 3
    cached = after.cached_tokens_total - before.cached_tokens_total
    assert after.prompt_tokens_total - before.prompt_tokens_total + cached == 4 * 70
    assert 0 < cached < 4 * 70


# The end ------------------------------------------------------------------------------------


def test_from_before_the_start_to_after_the_stop(idle_lab: Lab) -> None:
    lab, engine = idle_lab, idle_lab.engine
    lab.load("last")
    _, early = lab.submit(SHORT, greedy(4), lab.choice("last"))
    assert early.outputs == []
    engine.start()
    assert early.wait().token_ids == lab.expected(SHORT, 4, ("last", 1.0))
    assert engine.healthy
    _, running = lab.submit(SHORT, LONG_ANSWER)
    running.wait(2)
    assert engine.drain(timeout_s=0) is False, "one is still open"
    with pytest.raises(EngineUnavailable, match="shutting down"):
        lab.submit(SHORT, greedy(1))
    assert engine.healthy
    waiting = [sink for sink in (running,) if sink.finish_reason is None]
    engine.stop()
    for sink in waiting:
        assert isinstance(sink.wait().error, EngineUnavailable)
        assert "stopped" in str(sink.error)
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        lab.submit(SHORT, greedy(1))
    engine.cancel("r")
    assert engine.drain(timeout_s=0) is True, "nothing is open"
    engine.stop()


def test_draining_waits_for_those_accepted(idle_lab: Lab) -> None:
    """Only on an engine that is quick to start; the other has been seen to refuse and to end."""
    if idle_lab.kind != "embedded":
        pytest.skip("another test of vLLM's does this, without one more start")
    _, sink = idle_lab.submit(SHORT, greedy(5))
    idle_lab.engine.start()
    assert idle_lab.engine.drain(WAIT_S) is True
    assert sink.token_ids == idle_lab.expected(SHORT, 5)
    assert isinstance(sink, Recorder)

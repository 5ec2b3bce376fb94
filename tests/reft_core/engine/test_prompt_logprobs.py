"""Log-probabilities of a prompt's own tokens are those of the slow reference.

In mixed batches with adapters, whatever the chunks, and after a preemption; once each, with the
first output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch

from reft_core.adapter import Adapter
from reft_core.engine import packing as packing_module
from reft_core.engine import scheduler as scheduler_module
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams, Token
from reft_core.errors import InvalidRequest, RequestFailed
from tests.factories import (
    FAMILIES,
    NUM_LAYERS,
    VOCAB_SIZE,
    Recorder,
    random_adapter,
    random_prefix_adapter,
    random_prompt,
    shift_adapter,
    tiny_description,
    tiny_model,
)
from tests.reference.slow import reference_generate, reference_logits
from tests.reft_core.engine import engines
from tests.reft_core.engine.stepping import finish
from tests.reft_core.engine.test_engine_matches_reference import mixed_adapters

NUM_TOP = 3
MAX_TOKENS = 4
PARAMS = SamplingParams(
    max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, prompt_logprobs=NUM_TOP
)
PLAIN = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
READ_ONLY = SamplingParams(max_tokens=0, prompt_logprobs=NUM_TOP)
LONG = random_prompt(40, seed=1)


@cache
def top_layer() -> Adapter:
    """Edits the last layer at every position: each matters if each position's logits do."""
    return random_adapter(
        tiny_description(), seed=9, size=3.0, positions="prompt", layers=(NUM_LAYERS - 1,)
    )


make_engine = partial(engines.make_engine, max_model_len=128)


def submit(
    engine: EmbeddedEngine,
    name: str,
    prompt: Sequence[int],
    params: SamplingParams = PARAMS,
    adapter: Adapter | None = None,
) -> Recorder:
    recorder = Recorder()
    choices = (AdapterChoice(adapter.digest),) if adapter else ()
    engine.submit(Request(name, tuple(prompt), params, choices), recorder)
    return recorder


def assert_scored(
    found: tuple[Token | None, ...],
    prompt: Sequence[int],
    adapter: Adapter | None = None,
    family: str = "llama",
) -> None:
    """Each entry is what the reference says of the prompt's own token, and of the likeliest."""
    logits = reference_logits(tiny_model(family), list(prompt), len(prompt), adapter)
    rows = torch.log_softmax(logits, dim=-1)
    assert len(found) == len(prompt)
    assert found[0] is None
    for position, (entry, token) in enumerate(zip(found[1:], prompt[1:], strict=True)):
        row = rows[position]
        assert entry is not None
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=2e-3)
        above = int((row > row[token] + 2e-3).sum())
        assert above < (entry.rank or 0) <= int((row > row[token] - 2e-3).sum())
        likeliest = row.topk(NUM_TOP).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(likeliest, abs=2e-3)
        for top in entry.top_logprobs:
            assert top.logprob == pytest.approx(float(row[top.token_id]), abs=2e-3)


def prompt_logprobs(recorder: Recorder) -> tuple[Token | None, ...]:
    """Those of the first output; no later one has any."""
    first, *later = recorder.outputs
    assert all(output.prompt_logprobs == () for output in later)
    return first.prompt_logprobs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [512, 3])
def test_a_mixed_batch_equals_the_reference(family: str, chunk: int) -> None:
    """Half of the requests want them; the others' answers are what they always were."""
    engine = make_engine(family=family, max_prefill_tokens=chunk)
    adapters = mixed_adapters(engine.model)
    for adapter in adapters:
        if adapter:
            engine.load_adapter(adapter)
    asked = []
    for index in range(10):
        prompt = random_prompt([1, 2, 5, 13, 20][index % 5], seed=index)
        adapter = adapters[index % len(adapters)]
        params = PLAIN if index % 3 == 1 else PARAMS
        asked.append((prompt, adapter, submit(engine, str(index), prompt, params, adapter)))
    finish(engine, *(recorder for *_, recorder in asked))
    for index, (prompt, adapter, recorder) in enumerate(asked):
        answer = reference_generate(tiny_model(family), prompt, MAX_TOKENS, adapter)
        assert recorder.token_ids == answer
        if index % 3 == 1:
            assert prompt_logprobs(recorder) == ()
        else:
            assert_scored(prompt_logprobs(recorder), prompt, adapter, family)


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_virtual_tokens_shift_nothing(kind: Any, chunk: int) -> None:
    adapter = random_prefix_adapter(tiny_description(), kind, length=3)
    engine = make_engine(adapter, max_prefill_tokens=chunk)
    recorder = submit(engine, "r", LONG, adapter=adapter)
    one = submit(engine, "one token", LONG[:1], adapter=adapter)
    finish(engine, recorder, one)
    assert_scored(prompt_logprobs(recorder), LONG, adapter)
    assert prompt_logprobs(one) == (None,)


def test_last_layer_edits_act_wherever_logits_are_read() -> None:
    """They are dead but at the last position if only the next token's logits are wanted."""
    engine = make_engine(top_layer())
    recorders, tickets = [], []
    for name, params in (("scored", PARAMS), ("plain", PLAIN)):
        recorders.append(Recorder())
        request = Request(name, LONG, params, (AdapterChoice(top_layer().digest),))
        tickets.append(engine.submit(request, recorders[-1]))
        finish(engine, *recorders)  # together they would share their rows, and the edits in them
    assert [ticket.num_edits for ticket in tickets] == [len(LONG), 1]
    assert engine.stats().edits_applied_total == len(LONG) + 1
    assert_scored(prompt_logprobs(recorders[0]), LONG, top_layer())
    answer = reference_generate(tiny_model(), LONG, MAX_TOKENS, top_layer())
    assert [recorder.token_ids for recorder in recorders] == [answer, answer]


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_requests_with_one_prompt_in_one_step(order: tuple[int, ...], chunk: int) -> None:
    """What they have in common is computed once, but not where one is scored and another not."""
    lower = random_adapter(tiny_description(), seed=3, size=3.0, positions="f9+l3", layers=(2, 3))
    for adapter in (None, top_layer(), lower):
        used = (adapter, adapter, None)
        engine = make_engine(top_layer(), lower, max_prefill_tokens=chunk)
        params = (PLAIN, PARAMS, PARAMS)
        recorders = {i: submit(engine, str(i), LONG, params[i], used[i]) for i in order}
        finish(engine, *recorders.values())
        for i, recorder in recorders.items():
            answer = reference_generate(tiny_model(), LONG, MAX_TOKENS, used[i])
            assert recorder.token_ids == answer
            if params[i] is PARAMS:
                assert_scored(prompt_logprobs(recorder), LONG, used[i])


@pytest.mark.parametrize("adapter", [None, top_layer()], ids=["base", "top layer"])
def test_the_prefix_cache_is_filled_but_not_read(adapter: Adapter | None) -> None:
    """The same prompt before and after, whose keys and values are the same."""
    engine = make_engine(top_layer())
    before = submit(engine, "before", LONG, PLAIN, adapter)
    finish(engine, before)
    scored = submit(engine, "scored", LONG, PARAMS, adapter)
    finish(engine, scored)
    assert engine.stats().cached_tokens_total == 0
    assert_scored(prompt_logprobs(scored), LONG, adapter)

    fresh = make_engine(top_layer())
    scored = submit(fresh, "scored", LONG, PARAMS, adapter)
    finish(fresh, scored)
    after = submit(fresh, "after", LONG, PLAIN, adapter)
    finish(fresh, after)
    assert after.outputs[-1].num_cached_tokens == len(LONG) - 1
    assert before.token_ids == scored.token_ids == after.token_ids


def test_it_does_not_wait_for_a_prompt_that_it_could_not_take() -> None:
    engine = make_engine(max_prefill_tokens=len(LONG) + 8)
    first = submit(engine, "first", LONG, PLAIN)
    scored = submit(engine, "scored", LONG)
    engine.step()
    second = engine._scheduler.running[1]
    assert second.request.request_id == "scored"
    assert second.num_computed == 8
    finish(engine, first, scored)
    assert_scored(prompt_logprobs(scored), LONG)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("chunk", [7, 512])
def test_a_preemption_loses_and_repeats_nothing(cache_bytes: int, chunk: int) -> None:
    """Before the first token and after it; those that were cut short go on where they were."""
    engine = make_engine(
        top_layer(),
        max_model_len=64,
        kv_tokens=100,
        prefix_cache_bytes=cache_bytes,
        max_prefill_tokens=chunk,
    )
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, prompt_logprobs=NUM_TOP)
    prompts = [random_prompt(20, seed=seed) for seed in range(4)]
    adapters = [None, top_layer(), None, top_layer()]
    recorders = [
        submit(engine, str(i), prompt, params, adapter)
        for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True))
    ]
    finish(engine, *recorders)
    assert engine.stats().preemptions_total > 0
    for prompt, adapter, recorder in zip(prompts, adapters, recorders, strict=True):
        assert_scored(prompt_logprobs(recorder), prompt, adapter)
        assert recorder.token_ids == reference_generate(tiny_model(), prompt, 24, adapter)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_preemption_in_the_middle_of_the_prompt(cache_bytes: int) -> None:
    """What was scored stays, and positions scored before may come from the prefix cache."""
    engine = make_engine(max_prefill_tokens=9, prefix_cache_bytes=cache_bytes)
    recorder = submit(engine, "r", LONG)
    for _ in range(3):
        engine.step()
    (sequence,) = engine._scheduler.running
    assert len(sequence.prompt_logprobs) == 28
    engine._scheduler._preempt(sequence)
    engine.step()
    assert sequence.num_cached == (27 if cache_bytes else 0)
    finish(engine, recorder)
    assert_scored(prompt_logprobs(recorder), LONG)
    assert recorder.token_ids == reference_generate(tiny_model(), LONG, MAX_TOKENS)


def test_one_step_scores_a_bounded_number_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others go on meanwhile."""
    monkeypatch.setattr(packing_module, "MOST_SCORED", 10)
    seen: list[int] = []
    real = scheduler_module.Scheduler.next_prefill

    def spy(self: Any) -> Any:
        chunks = real(self)
        seen.append(sum(len(chunk.scored) for chunk in chunks))
        return chunks

    monkeypatch.setattr(scheduler_module.Scheduler, "next_prefill", spy)
    engine = make_engine()
    scored = [submit(engine, f"scored{i}", random_prompt(30, seed=i)) for i in range(2)]
    plain = submit(engine, "plain", random_prompt(50, seed=5), PLAIN)
    engine.step()
    assert len(plain.tokens) >= 1
    finish(engine, *scored, plain)
    assert max(seen) == 10
    assert sum(seen) == 2 * 29
    for i, recorder in enumerate(scored):
        assert_scored(prompt_logprobs(recorder), random_prompt(30, seed=i))


def test_without_tokens_a_prompt_is_only_read() -> None:
    """Also one that fills the context to the last token."""
    engine = make_engine(top_layer(), max_model_len=40)
    recorder = submit(engine, "r", LONG, READ_ONLY, top_layer())
    other = submit(engine, "other", LONG[:9], PLAIN)
    finish(engine, recorder, other)
    (output,) = recorder.outputs
    assert (output.token, output.finish_reason) == (None, "length")
    assert output.timings is not None
    assert_scored(output.prompt_logprobs, LONG, top_layer())
    assert other.token_ids == reference_generate(tiny_model(), LONG[:9], MAX_TOKENS)
    stats = engine.stats()
    assert (stats.num_running, stats.kv_tokens_used) == (0, 0)


def test_without_tokens_or_logprobs_it_warms_the_cache() -> None:
    engine = make_engine()
    finish(engine, submit(engine, "warm", LONG, SamplingParams(max_tokens=0)))
    again = submit(engine, "again", LONG, PLAIN)
    finish(engine, again)
    assert again.outputs[-1].num_cached_tokens == len(LONG) - 1
    finish(engine, warm := submit(engine, "warm again", LONG, SamplingParams(max_tokens=0)))
    assert warm.outputs[-1].num_cached_tokens == len(LONG) - 1


def test_a_given_completion_may_have_a_scored_prompt() -> None:
    engine = make_engine()
    recorder = Recorder()
    engine.submit(Request("r", LONG, PARAMS, completion=(5, 6)), recorder)
    finish(engine, recorder)
    assert recorder.token_ids == [5, 6]
    assert_scored(prompt_logprobs(recorder), LONG)


@pytest.mark.parametrize("chunk", [512, 4])
def test_logits_that_are_not_finite_end_their_request_alone(chunk: int) -> None:
    """Poison in the last layer at the third token alone: the answer would not be touched."""
    adapter = shift_adapter(tiny_description(), shift=3e38, gain=3e38, positions="2")
    engine = make_engine(adapter, max_prefill_tokens=chunk)
    bad = submit(engine, "bad", LONG[:9], adapter=adapter)
    empty = submit(engine, "bad, no tokens", LONG[:9], READ_ONLY, adapter)
    good = submit(engine, "good", LONG[:12])
    finish(engine, bad, empty, good)
    for recorder in (bad, empty):
        assert isinstance(recorder.error, RequestFailed)
        assert "not finite" in str(recorder.error)
        assert [output.prompt_logprobs for output in recorder.outputs] == [()]
    assert_scored(prompt_logprobs(good), LONG[:12])
    assert good.token_ids == reference_generate(tiny_model(), LONG[:12], MAX_TOKENS)
    assert engine.stats().kv_tokens_used == 0


def test_a_cancelled_request_has_none() -> None:
    engine = make_engine(max_prefill_tokens=9)
    recorder = submit(engine, "r", LONG)
    engine.step()
    engine.cancel("r")
    engine.step()
    assert recorder.finish_reason == "cancelled"
    assert prompt_logprobs(recorder) == ()


@pytest.mark.parametrize("value", [-1, 21, 1.5, math.nan])
def test_their_number_is_checked(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt_logprobs: got .* from 0 to 20"):
        SamplingParams(prompt_logprobs=value)


def test_there_are_no_more_than_tokens() -> None:
    """The largest number asked for is within the tests' vocabulary."""
    assert VOCAB_SIZE > 20

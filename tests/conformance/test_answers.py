"""What any engine answers: the slow reference's tokens, and the model's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from reft_core.engine.generate import generate
from reft_core.engine.interface import Request, SamplingParams, Token
from tests.conformance.lab import MAX_MODEL_LEN, Lab, greedy
from tests.factories import random_prompt
from tests.reference.slow import reference_logits
from tests.vllm.tiny import ADAPTERS, mixed_jobs

TOLERANCE = 1e-3
"""Largest difference of a log-probability, in float32."""


def test_outputs_of_one_request(lab: Lab) -> None:
    """A token each, in order; the last alone carries the reason and the timings."""
    prompt = random_prompt(40)
    ticket, sink = lab.submit(prompt, greedy(6))
    assert (ticket.num_prompt_tokens, ticket.num_edits) == (40, 0)
    sink.wait()
    assert sink.token_ids == lab.expected(prompt, 6)
    assert {output.request_id for output in sink.outputs} == {ticket.request_id}
    *early, last = sink.outputs
    assert all((o.finish_reason, o.error, o.timings) == (None, None, None) for o in early)
    assert (last.finish_reason, last.error) == ("length", None)
    assert last.timings is not None
    assert min(last.timings.queue_s, last.timings.prefill_s, last.timings.decode_s) >= 0


def test_a_mixed_batch_equals_the_reference(lab: Lab) -> None:
    """Adapters of every rule, stacks, strengths and the base model; twice, for the prefix cache."""
    lab.load(*ADAPTERS)
    jobs = mixed_jobs(num_rounds=1)
    for round_ in range(2):
        requests = [
            Request(
                f"mixed-{round_}-{number}",
                job.prompt,
                greedy(job.max_tokens),
                tuple(lab.choice(name, strength) for name, strength in job.stack),
            )
            for number, job in enumerate(jobs)
        ]
        for job, completion in zip(jobs, generate(lab.engine, requests), strict=True):
            expected = lab.expected(job.prompt, job.max_tokens, *job.stack)
            assert completion.token_ids == expected, (round_, job)
            assert (completion.num_edits > 0) == bool(job.stack)


def test_subspaces_leave_only_the_chosen_ranks(lab: Lab) -> None:
    lab.load("voiced")
    prompt, adapter = random_prompt(21), lab.adapters["voiced"]
    answers = []
    for subspaces in ({}, {"tone": 1.0}, {"topic": -2.0}):
        sink = lab.run(prompt, greedy(6, logprobs=0), lab.choice("voiced", subspaces=subspaces))
        logits = reference_logits(
            lab.world.model,
            [*prompt, *sink.token_ids],
            len(prompt),
            stack=[(adapter, 1.0)],
            subspaces={adapter.digest: subspaces} if subspaces else {},
        )
        expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        assert expected.argmax(-1).tolist() == sink.token_ids
        answers.append(sink.token_ids)
    assert len(set(map(tuple, answers))) == 3, "each must matter"


def test_strength_0_is_the_base_model(lab: Lab) -> None:
    lab.load("prompt")
    prompt = random_prompt(19)
    ticket, sink = lab.submit(prompt, greedy(6), lab.choice("prompt", 0.0))
    assert ticket.num_edits == 0
    assert sink.wait().token_ids == lab.expected(prompt, 6)
    assert sink.token_ids != lab.expected(prompt, 6, ("prompt", 1.0)), "it must matter"


def test_a_ticket_counts_the_edits_that_matter(lab: Lab) -> None:
    """Of the last layer's, the last token's alone, unless all of the prompt's logits are read."""
    lab.load("untied")
    for params, in_last_layer in [(greedy(1), 1), (greedy(1, prompt_logprobs=0), 8)]:
        ticket, sink = lab.submit(random_prompt(40), params, lab.choice("untied"))
        assert ticket.num_edits == 3 * 8 + in_last_layer
        sink.wait()


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("how", ["stop_token_ids", "eos"])
def test_a_stop_token_ends_and_is_delivered(lab: Lab, how: str, at: int) -> None:
    prompt = random_prompt(9, seed=3)
    answer = lab.expected(prompt, 6)
    assert answer.index(answer[at]) == at, "the token must not come earlier"
    config = lab.loaded.model.generation_config
    assert config is not None
    params = greedy(6, stop_token_ids=frozenset({answer[at]}))
    if how == "eos":
        params, before = greedy(6, ignore_eos=False), config.eos_token_id
        config.eos_token_id = answer[at]
    try:
        sink = lab.run(prompt, params)
        ignored = lab.run(prompt, greedy(6))
    finally:
        if how == "eos":
            config.eos_token_id = before
    assert (sink.finish_reason, sink.token_ids) == ("stop", answer[: at + 1])
    assert (ignored.finish_reason, ignored.token_ids) == ("length", answer)


def test_the_whole_context_may_be_used(lab: Lab) -> None:
    assert lab.engine.max_model_len == MAX_MODEL_LEN
    prompt = random_prompt(MAX_MODEL_LEN - 2, seed=5)
    assert lab.run(prompt, greedy(2)).token_ids == lab.expected(prompt, 2)
    whole = random_prompt(MAX_MODEL_LEN, seed=6)
    read = lab.run(whole, greedy(0))
    assert [(o.token, o.finish_reason) for o in read.outputs] == [(None, "length")]
    scored = lab.run(whole[:-1], greedy(1), completion=whole[-1:])
    assert scored.token_ids == [whole[-1]]


# Sampling -----------------------------------------------------------------------------------


def test_seeds_reproduce_whatever_else_is_in_the_batch(lab: Lab) -> None:
    """Alone and in a crowd; the prompt is longer than a chunk."""
    lab.load("last")
    prompt, choice = random_prompt(40, seed=4), lab.choice("last")

    def sampled(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)

    alone = lab.run(prompt, sampled(-1), choice)
    crowd = [lab.submit(random_prompt(5 + i), greedy(20))[1] for i in range(3)]
    among = lab.run(prompt, sampled(-1), choice)
    for other in crowd:
        assert other.wait().finish_reason == "length"
    assert among.token_ids == alone.token_ids
    others = {tuple(lab.run(prompt, sampled(seed), choice).token_ids) for seed in (7, 8)}
    assert len(others | {tuple(alone.token_ids)}) == 3


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0}]
)
def test_the_narrowest_sampling_is_greedy(lab: Lab, narrow: dict[str, float]) -> None:
    prompt = random_prompt(12, seed=8)
    params = SamplingParams(**({"max_tokens": 5, "ignore_eos": True, "temperature": 1} | narrow))
    assert lab.run(prompt, params).token_ids == lab.expected(prompt, 5)


PENALISED = {
    "logit_bias": {20: -100.0, 70: 4.0},
    "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
    "repetition_penalty": 1.7,
}


@pytest.mark.parametrize("names", [*([name] for name in PENALISED), list(PENALISED)])
def test_biases_and_penalties(lab: Lab, names: list[str]) -> None:
    """One by one, and all together in the order that the interface says."""
    prompt = random_prompt(9, seed=3)
    params = greedy(6, **{name: PENALISED[name] for name in names})
    tokens: list[int] = []
    for _ in range(6):
        logits = reference_logits(lab.world.model, [*prompt, *tokens], len(prompt))[-1]
        tokens.append(int(_changed(logits, params, prompt, tokens).argmax()))
    assert tokens != lab.expected(prompt, 6), "it must matter"
    assert lab.run(prompt, params).token_ids == tokens


def _changed(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> torch.Tensor:
    """The logits (V,) that a token is chosen from, one entry at a time."""
    changed = logits.clone()
    for token, bias in params.logit_bias.items():
        changed[token] += bias
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        changed[token] *= 1 / factor if changed[token] > 0 else factor
    for token in answer:
        changed[token] -= params.frequency_penalty
    for token in set(answer):
        changed[token] -= params.presence_penalty
    return changed


# Log-probabilities --------------------------------------------------------------------------


def assert_tokens(tokens: list[Token], logprobs: torch.Tensor, num_top: int) -> None:
    """Each token has its own and the likeliest log-probabilities of its row."""
    for token, row in zip(tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
        values = [each.logprob for each in token.top_logprobs]
        assert values == pytest.approx(row.topk(num_top).values.tolist(), abs=TOLERANCE)
        assert [float(row[each.token_id]) for each in token.top_logprobs] == pytest.approx(
            values, abs=TOLERANCE
        )


def test_log_probabilities_are_the_models_own(lab: Lab) -> None:
    """Whatever bias, penalties and temperature make of them; of the prompt too."""
    lab.load("prompt")
    prompt = random_prompt(40, seed=10)
    params = SamplingParams(
        max_tokens=5,
        temperature=0.7,
        seed=3,
        logit_bias={7: 3.0},
        presence_penalty=1.0,
        ignore_eos=True,
        logprobs=4,
        prompt_logprobs=2,
    )
    sink = lab.run(prompt, params, lab.choice("prompt"))
    rows = lab.logprobs([*prompt, *sink.token_ids], len(prompt), "prompt")
    assert_tokens(sink.tokens, rows[len(prompt) - 1 : -1], 4)
    first, *later = sink.outputs
    assert not any(output.prompt_logprobs for output in later)
    nothing, *scored = first.prompt_logprobs
    assert nothing is None
    assert [token.token_id for token in scored if token] == list(prompt[1:])
    assert_tokens([token for token in scored if token], rows[: len(prompt) - 1], 2)
    for token, row in zip(scored, rows, strict=False):
        assert token is not None
        assert token.rank == int((row > row[token.token_id]).sum()) + 1


@pytest.mark.parametrize("num_top", [None, 0])
def test_without_tokens_a_prompt_is_only_read(lab: Lab, num_top: int | None) -> None:
    prompt = random_prompt(20, seed=12)
    sink = lab.run(prompt, greedy(0, prompt_logprobs=num_top))
    (output,) = sink.outputs
    assert (output.token, output.finish_reason, output.error) == (None, "length", None)
    assert len(output.prompt_logprobs) == (0 if num_top is None else len(prompt))


def test_a_given_completion_is_scored(lab: Lab) -> None:
    """Its tokens count as generated: they are not edited, and do not move the edited positions."""
    lab.load("untied")
    prompt, completion = random_prompt(37, seed=13), (3, 5, 2, 7, 2)
    odd = SamplingParams(
        max_tokens=1, temperature=2, seed=3, top_k=1, stop_token_ids=frozenset(completion)
    )
    for names in ((), ("untied",)):
        choices = [lab.choice(name) for name in names]
        plain = lab.run(prompt, odd, *choices, completion=completion)
        both = lab.run(
            prompt, greedy(1, logprobs=3, prompt_logprobs=1), *choices, completion=completion
        )
        rows = lab.logprobs([*prompt, *completion], len(prompt), *names)
        for sink, num_top in ((plain, 0), (both, 3)):
            assert (sink.token_ids, sink.finish_reason) == (list(completion), "length")
            assert_tokens(sink.tokens, rows[len(prompt) - 1 : -1], num_top)
        scored = [token for token in both.outputs[0].prompt_logprobs if token]
        assert_tokens(scored, rows[: len(prompt) - 1], 1)

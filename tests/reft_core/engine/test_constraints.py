"""A request's constraint binds its own tokens, ends its request, and fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_core.engine.config import EngineConfig
from reft_core.engine.constraint import Constraint
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, Request, SamplingParams
from reft_core.errors import InvalidRequest, RequestFailed
from tests.factories import (
    VOCAB_SIZE,
    Recorder,
    random_adapter,
    random_prompt,
    tiny_description,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import reference_generate, reference_logits
from tests.reft_core.engine.stepping import finish

EOS = 2
GREEDY = SamplingParams(max_tokens=12, temperature=0)
PROMPT = random_prompt(9, seed=3)


class Steps:
    """Allows, one after the other, the tokens of each step; then only the end token."""

    def __init__(self, *steps: Sequence[int]) -> None:
        self.steps = steps
        self.accepted: list[int] = []

    def allowed(self) -> Tensor:
        mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        mask[list(self.steps[len(self.accepted)]) if not self.is_finished else EOS] = True
        return mask

    def accept(self, token_id: int) -> None:
        assert self.allowed()[token_id]
        self.accepted.append(token_id)

    @property
    def is_finished(self) -> bool:
        return len(self.accepted) == len(self.steps)


class Failing(Steps):
    """Raises where it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__(*[range(3, 50)] * 9)
        self.where = where

    def allowed(self) -> Tensor:
        if self.where == "allowed" and len(self.accepted) == 2:
            raise ValueError("out of order")
        return super().allowed()

    def accept(self, token_id: int) -> None:
        if self.where == "accept" and len(self.accepted) == 2:
            raise ValueError("out of order")
        super().accept(token_id)


def make_engine(**config: Any) -> EmbeddedEngine:
    return EmbeddedEngine(
        tiny_loaded(), EngineConfig(**{"max_num_seqs": 4, "max_model_len": 64} | config)
    )


def submit(
    engine: EmbeddedEngine,
    name: str,
    constraint: Constraint | None,
    params: SamplingParams = GREEDY,
    adapters: tuple[AdapterChoice, ...] = (),
) -> Recorder:
    recorder = Recorder()
    engine.submit(Request(name, PROMPT, params, adapters, constraint=constraint), recorder)
    return recorder


def constrained_greedy(steps: Sequence[Sequence[int]], adapter: Any = None) -> list[int]:
    """The likeliest allowed token in each place, by the slow reference."""
    tokens = list(PROMPT)
    for step in steps:
        logits = reference_logits(tiny_model(), tokens, len(PROMPT), adapter)[-1]
        tokens.append(max(step, key=lambda token: float(logits[token])))
    return tokens[len(PROMPT) :]


STEPS = ([5, 6, 7], range(30, 60), [9], range(3, 90), [4, 44])


def test_a_mixed_batch_follows_each_requests_constraint() -> None:
    """With an adapter and without, beside one that is free."""
    adapter = random_adapter(tiny_description(), seed=1, size=2.0, positions="prompt")
    engine = make_engine()
    engine.load_adapter(adapter)
    with_adapter = (AdapterChoice(adapter.digest),)
    base = submit(engine, "base", Steps(*STEPS))
    edited = submit(engine, "edited", Steps(*STEPS), adapters=with_adapter)
    free = submit(engine, "free", None, replace(GREEDY, ignore_eos=True))
    finish(engine, base, edited, free)
    assert base.token_ids == constrained_greedy(STEPS)
    assert edited.token_ids == constrained_greedy(STEPS, adapter)
    assert free.token_ids == reference_generate(tiny_model(), PROMPT, 12)


def test_the_end_of_a_constraint_is_the_end_of_the_answer() -> None:
    """Its last token is part of the answer, which the end token is not."""
    engine = make_engine()
    whole = submit(engine, "whole", Steps([5], [6]))
    ended = submit(engine, "ended", Steps([5], [EOS], [7]))
    ignored = submit(engine, "ignored", Steps([5], [EOS], [7]), replace(GREEDY, ignore_eos=True))
    short = submit(engine, "short", Steps([5], [6], [7]), replace(GREEDY, max_tokens=2))
    exact = submit(engine, "exact", Steps([5], [6]), replace(GREEDY, max_tokens=2))
    recorders = (whole, ended, ignored, short, exact)
    finish(engine, *recorders)
    assert [recorder.token_ids for recorder in recorders] == [
        [5, 6], [5, EOS], [5, EOS, 7], [5, 6], [5, 6]
    ]  # fmt: skip
    assert [(r.finish_reason, r.outputs[-1].completes_constraint) for r in recorders] == [
        ("stop", True),
        ("stop", False),
        ("stop", True),
        ("length", False),
        ("stop", True),
    ]
    assert not any(o.completes_constraint for r in recorders for o in r.outputs[:-1])


@pytest.mark.parametrize("where", ["allowed", "accept"])
def test_a_constraint_that_raises_ends_its_request_alone(where: str) -> None:
    engine = make_engine()
    bad = submit(engine, "bad", Failing(where))
    good = submit(engine, "good", Steps(*STEPS))
    free = submit(engine, "free", None, replace(GREEDY, ignore_eos=True))
    finish(engine, bad, good, free)
    assert isinstance(bad.error, RequestFailed)
    assert "out of order" in str(bad.error)
    assert len(bad.tokens) == 2
    assert good.token_ids == constrained_greedy(STEPS)
    assert free.token_ids == reference_generate(tiny_model(), PROMPT, 12)
    assert engine.stats().num_running == 0


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=12, seed=4, logprobs=3)])
def test_a_preempted_answer_goes_on_where_it_was(params: SamplingParams) -> None:
    """The constraint has seen every token once."""
    steps = [range(3, 90, 2), range(4, 90, 2)] * 5

    def run(disturb: Callable[[EmbeddedEngine], None]) -> tuple[Recorder, Steps]:
        engine = make_engine(prefix_cache_bytes=0, max_prefill_tokens=5)
        constraint = Steps(*steps)
        recorder = submit(engine, "r", constraint, params)
        for _ in range(6):
            engine.step()
        disturb(engine)
        finish(engine, recorder)
        return recorder, constraint

    def preempt(engine: EmbeddedEngine) -> None:
        (sequence,) = engine._scheduler.running
        assert 2 < sequence.num_generated < 8
        engine._scheduler._preempt(sequence)

    calm, _ = run(lambda _: None)
    disturbed, constraint = run(preempt)
    assert disturbed.token_ids == calm.token_ids == constraint.accepted
    assert len(calm.token_ids) == 10


def test_a_seed_chooses_alike_in_any_batch() -> None:
    params = SamplingParams(max_tokens=9, seed=7, top_p=0.9, logprobs=1)
    steps = [range(3, 90)] * 9
    alone_in, crowd_in = make_engine(), make_engine()
    alone = submit(alone_in, "r", Steps(*steps), params)
    others = [submit(crowd_in, f"{i}", None, SamplingParams(seed=i)) for i in range(2)]
    among = submit(crowd_in, "r", Steps(*steps), params)
    finish(alone_in, alone)
    finish(crowd_in, among, *others)
    assert among.token_ids == alone.token_ids
    assert len(set(alone.token_ids)) > 1


def test_log_probabilities_stay_the_models_own() -> None:
    engine = make_engine()
    recorder = submit(engine, "r", Steps([5], [6]), replace(GREEDY, logprobs=1))
    finish(engine, recorder)
    logits = reference_logits(tiny_model(), [*PROMPT, 5, 6], len(PROMPT))
    rows = torch.log_softmax(logits[len(PROMPT) - 1 : -1], dim=-1)
    for row, token in zip(rows, recorder.tokens, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
        assert token.top_logprobs[0].token_id == int(row.argmax())


def test_a_given_completion_takes_none() -> None:
    with pytest.raises(InvalidRequest, match=r"^constraint: got .* none beside a given"):
        Request("r", PROMPT, completion=(5,), constraint=Steps([5]))

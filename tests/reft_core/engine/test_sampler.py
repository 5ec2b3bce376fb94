"""Sampling equals brute force, and no row's choice depends on its neighbours."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reft_core.batch import AdapterUse, PromptEdits
from reft_core.engine.interface import Request, SamplingParams, Token
from reft_core.engine.sampler import sample
from reft_core.engine.sequence import Sequence
from reft_core.errors import RequestFailed
from tests.factories import random_prefix_adapter, tiny_description

V = 8
PROMPT = (1, 3, 3)


def sequence(params: SamplingParams, generated: tuple[int, ...] = ()) -> Sequence:
    made = Sequence(Request("r", PROMPT, params), print, None, frozenset())
    made.token_ids += generated
    return made


def choose(logits: Tensor, params: SamplingParams, generated: tuple[int, ...] = ()) -> Token:
    """The one token of a batch of one."""
    (token,) = sample(logits.clone().unsqueeze(0), [sequence(params, generated)])
    assert isinstance(token, Token), token
    return token


def draw_many(logits: Tensor, count: int, **fields: Any) -> Counter[int]:
    """How often each token comes, with seeds 0 to ``count - 1``."""
    rows = [sequence(SamplingParams(seed=seed, **fields)) for seed in range(count)]
    tokens = sample(logits.repeat(count, 1), rows)
    assert all(isinstance(token, Token) for token in tokens)
    return Counter(token.token_id for token in tokens if isinstance(token, Token))


def probabilities(logits: Tensor, temperature: float = 1.0) -> list[float]:
    weights = [math.exp(x / temperature) for x in logits.double().tolist()]
    return [weight / sum(weights) for weight in weights]


def kept_tokens(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> set[int]:
    """Tokens that every one of the filters keeps, by their definitions."""
    p = probabilities(logits, temperature)
    ranked = sorted(range(V), key=lambda token: -p[token])
    kept = set(ranked[: top_k or V])
    mass, nucleus = 0.0, set()
    for token in ranked:  # the fewest likeliest tokens whose mass reaches top_p
        nucleus.add(token)
        mass += p[token]
        if mass >= top_p:
            break
    if top_p < 1:
        kept &= nucleus
    return {token for token in kept if p[token] >= min_p * max(p)}


SPREAD = torch.tensor([0.3, -0.4, 1.1, 0.0, 0.8, -0.1, 0.6, -0.7])  # each of 4 % or more


def test_greedy_takes_the_likeliest() -> None:
    assert choose(SPREAD, SamplingParams(temperature=0)).token_id == 2
    assert choose(SPREAD, SamplingParams(temperature=0, top_k=3, top_p=0.5)).token_id == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        *({"temperature": t} for t in (1e-3, 1e-6, 1e-30, 1e-37, 1e-40, 1e-45, 1e-300, 5e-324)),
    ],
)
def test_these_are_greedy_too(fields: dict[str, Any]) -> None:
    """The smallest temperatures divide float32 logits past infinity."""
    assert set(draw_many(SPREAD * 10, 20, **fields)) == {2}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 3},
        {"top_k": V + 5},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"min_p": 0.4},
        {"temperature": 2.0, "min_p": 0.6},
        {"temperature": 0.5, "top_p": 0.8},
        {"top_k": 4, "top_p": 0.9, "min_p": 0.5},
        {"top_k": 6, "top_p": 0.6},
        {"top_k": 2, "top_p": 0.99, "min_p": 0.01},
    ],
)
def test_only_kept_tokens_come_and_as_often_as_they_should(fields: dict[str, Any]) -> None:
    """All of them, by softmax renormalised over the kept; a chi-square test of 1,500 draws."""
    count = 1500
    kept = kept_tokens(SPREAD, **fields)
    found = draw_many(SPREAD, count, **fields)
    assert set(found) == kept
    p = probabilities(SPREAD, fields.get("temperature", 1.0))
    total = sum(p[token] for token in kept)
    expected = {token: count * p[token] / total for token in kept}
    chi_square = sum((found[t] - expected[t]) ** 2 / expected[t] for t in kept)
    # Mean k-1, variance 2(k-1); five deviations above.
    freedom = len(kept) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom), (chi_square, found, expected)


@given(
    st.integers(0, 10_000),
    st.integers(0, V),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_no_filtered_token_ever_comes(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed))
    fields: dict[str, Any] = {
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "temperature": temperature,
    }
    assert set(draw_many(logits, 20, **fields)) <= kept_tokens(logits, **fields)


penalties = st.sampled_from([-2.0, -0.7, 0.0, 0.3, 2.0])


@given(
    seed=st.integers(0, 10_000),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 5.0]),
    presence=penalties,
    frequency=penalties,
    bias=st.dictionaries(st.integers(0, V - 1), st.floats(-3, 3), max_size=3),
    generated=st.lists(st.integers(0, V - 1), max_size=6).map(tuple),
)
def test_penalties_and_bias_follow_their_formulas(
    seed: int,
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    generated: tuple[int, ...],
) -> None:
    """Bias; repetition over prompt and output; presence and frequency over the output."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed))
    expected = logits.tolist()
    for token in range(V):
        expected[token] += bias.get(token, 0.0)
        if token in (*PROMPT, *generated):
            positive = expected[token] > 0
            expected[token] *= 1 / repetition if positive else repetition
        if token in generated:
            expected[token] -= presence + frequency * generated.count(token)
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    chosen = choose(logits, params, generated).token_id
    assert expected[chosen] >= max(expected) - 1e-5, expected


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_penalties_do_not_see_virtual_tokens(kind: Literal["kv", "embedding"]) -> None:
    """Their places hold token 0, which nobody wrote."""
    logits = torch.tensor([2.0, 1.9, 0.0, 0.0, 0.0, 1.8, 0.0, 0.0])
    params = SamplingParams(temperature=0, repetition_penalty=10, frequency_penalty=2)
    adapter = random_prefix_adapter(tiny_description(), kind, length=2)
    edits = PromptEdits((AdapterUse(adapter),), len(PROMPT))
    request = Request("r", PROMPT, params)

    def chosen(generated: list[int]) -> int:
        one = Sequence(request, print, edits, frozenset())
        one.token_ids += generated
        (token,) = sample(logits.clone().unsqueeze(0), [one])
        assert isinstance(token, Token)
        return token.token_id

    assert chosen([]) == chosen([1]) == 0
    assert chosen([0]) == 5, "once generated it is seen, and 1 is in the prompt"


def test_penalties_act_before_the_draw() -> None:
    fields: dict[str, Any] = {"logit_bias": {2: -100, 4: -100, 6: -100}, "top_k": 1}
    assert set(draw_many(SPREAD, 10, **fields)) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_forces_and_forbids(temperature: float) -> None:
    for seed in range(10):
        forced = SamplingParams(temperature=temperature, logit_bias={7: 100}, seed=seed)
        assert choose(SPREAD, forced).token_id == 7
        others = {token: -100 for token in range(V) if token != 1}
        forbidden = SamplingParams(temperature=temperature, logit_bias=others, seed=seed)
        assert choose(SPREAD, forbidden).token_id == 1


def test_an_extreme_penalty_does_not_break_the_draw() -> None:
    """A repetition penalty that small makes a seen token's positive logit infinite."""
    found = draw_many(SPREAD + 1, 20, repetition_penalty=1e-300)
    assert set(found) <= set(PROMPT)


def test_a_seed_chooses_alike_alone_and_among_any_neighbours() -> None:
    """Every kind of neighbour, also one that fails; two tokens, so the generator moves on."""
    logits = torch.randn(6, V)
    logits[4] = math.nan
    fields: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 1, "temperature": 0.7, "logprobs": 2},
        {"temperature": 0},
        {"seed": 2, "top_p": 0.7, "frequency_penalty": 1.0},
        {"seed": 3},
        {},
    ]
    together = [sequence(SamplingParams(**field)) for field in fields]
    batches = [sample(logits.clone(), together) for _ in range(2)]
    for row in (0, 1, 2, 3):
        alone = [sequence(SamplingParams(**fields[row]))]
        for batch in batches:
            assert sample(logits[row : row + 1].clone(), alone) == [batch[row]]
    assert isinstance(batches[0][4], RequestFailed)
    assert len({draw.token_id for draw in map(one, range(20))}) > 3, "seeds differ"


def one(seed: int) -> Token:
    return choose(SPREAD, SamplingParams(seed=seed))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.5, "seed": 1, "top_k": 2},
        {"temperature": 0, "logit_bias": {1: 100.0}, "presence_penalty": 1.0},
    ],
)
@pytest.mark.parametrize("num_top", [0, 3, V])
def test_logprobs_are_the_models_own(fields: dict[str, Any], num_top: int) -> None:
    """Natural, of the whole vocabulary, before bias, penalties and temperature."""
    token = choose(SPREAD, SamplingParams(**fields, logprobs=num_top))
    p = probabilities(SPREAD)
    assert token.logprob == pytest.approx(math.log(p[token.token_id]), abs=1e-5)
    likeliest = sorted(range(V), key=lambda i: -p[i])[:num_top]
    assert [entry.token_id for entry in token.top_logprobs] == likeliest
    for entry in token.top_logprobs:
        assert entry.logprob == pytest.approx(math.log(p[entry.token_id]), abs=1e-5)
    if num_top == V:
        total = sum(math.exp(entry.logprob) for entry in token.top_logprobs)
        assert total == pytest.approx(1, abs=1e-5)


def test_logprobs_come_only_when_asked_for() -> None:
    token = choose(SPREAD, SamplingParams(temperature=0))
    assert token == Token(2, None, ())


@pytest.mark.parametrize(
    "poison",
    [
        {0: math.nan},
        {V - 1: math.nan},
        {3: math.inf},
        dict.fromkeys(range(V), math.nan),
        dict.fromkeys(range(V), -math.inf),
    ],
)
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "logprobs": 3}])
def test_a_row_that_is_not_finite_fails_alone(
    poison: dict[int, float], fields: dict[str, Any]
) -> None:
    logits = SPREAD.repeat(3, 1)
    for column, value in poison.items():
        logits[1, column] = value
    rows = [sequence(SamplingParams(**fields)) for _ in range(3)]
    first, second, third = sample(logits, rows)
    assert isinstance(second, RequestFailed)
    assert "not finite" in str(second)
    assert first == third == choose(SPREAD, SamplingParams(**fields))


def test_a_token_of_probability_zero_is_no_failure() -> None:
    logits = SPREAD.clone()
    logits[2] = -math.inf
    assert choose(logits, SamplingParams(temperature=0)).token_id == 4
    assert 2 not in draw_many(logits, 50)


class Broken:
    """A constraint that raises."""

    is_finished = False

    def allowed(self) -> Tensor:
        raise ValueError("out of order")

    def accept(self, _token_id: int) -> None:
        raise AssertionError("nothing was chosen")


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "logprobs": V}])
def test_a_row_that_raises_fails_alone(fields: dict[str, Any]) -> None:
    """And the numbers that its neighbours draw are not used up by the first try."""
    rows = [sequence(SamplingParams(**fields)) for _ in range(3)]
    rows[1].request = replace(rows[1].request, constraint=Broken())
    expected = sequence(SamplingParams(**fields))
    for _ in range(2):
        first, second, third = sample(SPREAD.repeat(3, 1), rows)
        assert isinstance(second, RequestFailed)
        assert "sampling failed: out of order" in str(second)
        assert [first] == [third] == sample(SPREAD.unsqueeze(0), [expected])


def test_more_logprobs_than_tokens_are_all() -> None:
    token = choose(SPREAD, SamplingParams(temperature=0, logprobs=V + 1))
    assert len(token.top_logprobs) == V


class Only:
    """A constraint that always allows the same tokens."""

    is_finished = False

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def allowed(self) -> Tensor:
        return torch.tensor([token in self.token_ids for token in range(V)])

    def accept(self, token_id: int) -> None:
        assert token_id in self.token_ids


def test_a_constraint_binds_its_own_row() -> None:
    """After bias and penalties; the log-probabilities stay the model's own."""
    fields: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 1},
        {"seed": 3, "top_k": 1},
        {"temperature": 0, "logit_bias": {2: 100.0}},
        {"temperature": 0},
    ]
    rows = [sequence(SamplingParams(**field)) for field in fields]
    for row in rows[:3]:
        row.request = replace(row.request, constraint=Only(1, 7))
    tokens = sample(SPREAD.repeat(4, 1), rows)
    assert [t.token_id for t in tokens if isinstance(t, Token)] == [1, 1, 1, 2]
    assert isinstance(tokens[0], Token)
    p = probabilities(SPREAD)
    assert tokens[0].logprob == pytest.approx(math.log(p[1]), abs=1e-5)
    assert tokens[0].top_logprobs[0].token_id == 2


def test_a_constraint_that_allows_nothing_fails_alone() -> None:
    rows = [sequence(SamplingParams(temperature=0)) for _ in range(2)]
    rows[0].request = replace(rows[0].request, constraint=Only())
    first, second = sample(SPREAD.repeat(2, 1), rows)
    assert isinstance(first, RequestFailed)
    assert "allows no token" in str(first)
    assert second == Token(2)


def test_large_batches_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"seed": i, "logprobs": i % 3} if i % 4 else {"temperature": 0} for i in range(11)]
    logits = torch.randn(11, V, generator=torch.Generator().manual_seed(0))
    whole = sample(logits, [sequence(SamplingParams(**row)) for row in rows])
    monkeypatch.setattr("reft_core.engine.logprobs._MOST_NUMBERS_CPU", 2 * V)
    assert sample(logits, [sequence(SamplingParams(**row)) for row in rows]) == whole

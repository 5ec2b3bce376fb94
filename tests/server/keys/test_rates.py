from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_core.errors import InvalidRequest, RateLimited
from server.keys import Caller, Limits, Principal, Rates
from server.keys.buckets import Bucket
from server.keys.usage import Usage


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def caller(clock: Clock, usage: Usage | None = None, **limits: int) -> Caller:
    principal = Principal("id", "someone", "acme", limits=Limits(**limits))
    return Rates(usage or Usage(), clock).caller(principal)


def refused(call) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        call()
    return caught.value


def ask(who: Caller) -> None:
    with who.open():
        pass


def test_a_bucket_gives_a_minutes_worth_and_then_fills_steadily(clock):
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait_s(1) == pytest.approx(1)
    clock.now += 1
    assert bucket.wait_s(1) == 0
    assert bucket.wait_s(60) == pytest.approx(59)
    clock.now += 3600
    assert bucket.level == 60


def test_what_a_bucket_owes_is_waited_for(clock):
    bucket = Bucket(60, clock)
    bucket.take(180)
    assert bucket.level == -120
    assert bucket.wait_s(1) == pytest.approx(121)
    bucket.take(-180)
    assert bucket.level == 60


@given(st.lists(st.tuples(st.floats(0, 90), st.integers(0, 200)), max_size=50))
def test_a_bucket_never_gives_more_than_its_rate(steps):
    clock = Clock()
    bucket, began_at, taken = Bucket(100, clock), clock.now, 0
    for wait, amount in steps:
        clock.now += wait
        if amount <= 100 and bucket.wait_s(amount) == 0:
            bucket.take(amount)
            taken += amount
    assert taken <= 100 + (clock.now - began_at) * 100 / 60 + 1e-6


def test_requests_over_the_rate_are_refused_until_there_is_one_again(clock):
    who = caller(clock, requests_per_minute=2)
    ask(who)
    ask(who)
    error = refused(lambda: ask(who))
    assert error.retry_after_s == pytest.approx(30)
    assert "at most 2" in error.message
    clock.now += error.retry_after_s
    ask(who)
    refused(lambda: ask(who))


def test_without_limits_nothing_is_refused(clock):
    who = caller(clock)
    for _ in range(10_000):
        ask(who)
    who.reserve(10**12)
    assert who.headers() == {}


def test_requests_at_once(clock):
    who = caller(clock, max_concurrency=2, requests_per_minute=1000)
    with who.open():
        with who.open():
            left = who.headers()["x-ratelimit-remaining-requests"]
            assert "at most 2 requests" in refused(lambda: ask(who)).message
            assert who.headers()["x-ratelimit-remaining-requests"] == left, "it cost nothing"
        ask(who)
    with pytest.raises(ZeroDivisionError), who.open():
        raise ZeroDivisionError
    with who.open():
        ask(who)


def test_a_prompt_waits_for_its_tokens_and_an_answer_does_not(clock):
    who = caller(clock, tokens_per_minute=600)
    who.reserve(500)
    who.charge(500, 0, reserved=True)
    for _ in range(300):
        who.charge(0, 1)
    error = refused(lambda: who.reserve(100))
    assert error.retry_after_s == pytest.approx(30)  # 200 owed and 100 wanted, at 10 a second
    clock.now += 30
    who.reserve(100)


def test_a_prompt_that_no_waiting_lets_in_is_no_matter_of_rate(clock):
    who = caller(clock, tokens_per_minute=600)
    who.reserve(600)
    with pytest.raises(InvalidRequest, match="at most 600"):
        caller(clock, tokens_per_minute=600).reserve(601)


def test_a_prompt_that_was_not_accepted_is_given_back(clock):
    who = caller(clock, tokens_per_minute=600)
    who.reserve(600)
    who.give_back(600)
    who.reserve(600)


def test_keys_have_accounts_of_their_own(clock):
    rates = Rates(Usage(), clock)
    one, other = (
        rates.caller(Principal(key_id, key_id, limits=Limits(requests_per_minute=1)))
        for key_id in ("one", "other")
    )
    ask(one)
    refused(lambda: ask(one))
    ask(other)
    again = rates.caller(Principal("one", "one", limits=Limits(requests_per_minute=1)))
    refused(lambda: ask(again))


def test_the_headers_are_openais(clock):
    who = caller(clock, requests_per_minute=60, tokens_per_minute=600)
    ask(who)
    who.reserve(100)
    assert who.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10.000s",
    }
    who.charge(0, 1000)
    assert who.headers()["x-ratelimit-remaining-tokens"] == "0"


def test_use_is_counted_by_tenant(clock):
    usage = Usage()
    who = caller(clock, usage, requests_per_minute=1)
    ask(who)
    refused(lambda: ask(who))
    who.reserve(7)
    who.charge(7, 0, reserved=True)
    who.charge(0, 3)

    def value(name: str, **labels: str) -> float | None:
        return usage.registry.get_sample_value(f"reft_tenant_{name}_total", labels)

    assert value("requests", tenant="acme") == 1
    assert value("requests_refused", tenant="acme", limit="requests") == 1
    assert value("prompt_tokens", tenant="acme") == 7
    assert value("generation_tokens", tenant="acme") == 3
    assert value("requests", tenant="") is None

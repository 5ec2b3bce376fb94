"""The official client, over real sockets, used as its documentation shows."""

from __future__ import annotations

import asyncio

import openai
import pytest

from reft_core.errors import (
    DeadlineExceeded,
    EngineOverloaded,
    EngineUnavailable,
    RequestFailed,
)
from tests.server.conftest import API_KEY
from tests.server.fakes import MODEL, make_adapter, wait_until

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(live):
    with live.openai() as client:
        yield client


def test_models(live, client):
    digest = live.upload("tone", make_adapter(1))["digest"]
    assert [model.id for model in client.models.list()] == [MODEL.name, "tone"]
    assert client.models.retrieve("tone").reft["digest"] == digest


def test_completions(live, client):
    live.upload("tone", make_adapter(1))
    answer = client.completions.create(
        model="tone", prompt="hi", max_tokens=99, n=2, seed=1, extra_body={"top_k": 5}
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.text.startswith("I am ") for choice in answer.choices)
    assert answer.usage.prompt_tokens == 2
    assert answer.reft["num_edits"] == 8
    raw = client.completions.with_raw_response.create(model="tone", prompt="hi")
    assert raw.headers["x-reft-adapter"] == answer.reft["digest"]


def test_chat(client):
    answer = client.chat.completions.create(
        model=MODEL.name, messages=HELLO, n=2, stop=["base"], logprobs=True, top_logprobs=2
    )
    assert [c.message.content for c in answer.choices] == ["I am ", "I am "]
    assert {c.finish_reason for c in answer.choices} == {"stop"}
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == "I am "
    assert len(entries[0].top_logprobs) == 2
    assert bytes(entries[0].bytes) == b"I"


def test_chat_stream_with_usage(client):
    text, usage, reasons = "", None, []
    for chunk in client.chat.completions.create(
        model=MODEL.name, messages=HELLO, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == "I am base."
    assert reasons == ["stop"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_clients_own_stream_helper(client):
    with client.chat.completions.stream(model=MODEL.name, messages=HELLO) as stream:
        content = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert content == final.choices[0].message.content == "I am base."


def test_completion_stream(client):
    chunks = list(client.completions.create(model=MODEL.name, prompt="hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "I am base."
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_asynchronous_client_with_many_requests(live):
    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{live.url}/v1", api_key="x", max_retries=0
        ) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=MODEL.name, messages=HELLO)
                  for _ in range(12))
            )  # fmt: skip
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(scenario()) == ["I am base."] * 12


def test_errors_are_of_the_clients_own_classes(client, engine):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HELLO)
    assert missing.value.code == "model_not_found"
    assert MODEL.name in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL.name, messages=HELLO, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as lacking:
        client.chat.completions.create(
            model=MODEL.name,
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert lacking.value.code == "unsupported_parameter"
    engine.refuse_with = EngineOverloaded("the queue is full")
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model=MODEL.name, messages=HELLO)
    assert full.value.response.headers["retry-after"] == "1"


def test_an_error_in_a_stream_raises(client, engine):
    engine.fail_after, engine.failure = 4, RequestFailed("decode failed")
    text = ""
    with pytest.raises(openai.APIError, match="decode failed"):  # noqa: PT012
        for chunk in client.chat.completions.create(model=MODEL.name, messages=HELLO, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "I am"


def test_keys(on_socket):
    with on_socket(api_key=API_KEY) as server:
        with server.openai("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with server.openai(API_KEY) as client:
            assert client.models.list().data[0].id == MODEL.name


@pytest.mark.parametrize(
    ("refusal", "status", "wait"),
    [
        (EngineOverloaded("the queue is full", retry_after_s=3), 429, 3.0),
        (EngineUnavailable("the engine is draining"), 503, 5.0),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_client_retries_after_the_time_it_is_told(
    live, engine, monkeypatch, refusal, status, wait, streaming
):
    waits = []

    def instead_of_sleep(self, *, retries_taken, max_retries, options, response):
        assert response.status_code == status
        waits.append(self._parse_retry_after_header(response.headers))
        if len(waits) == 2:
            engine.refuse_with = None

    monkeypatch.setattr(openai.OpenAI, "_sleep_for_retry", instead_of_sleep)
    engine.refuse_with = refusal
    with live.openai() as client:
        answer = client.with_options(max_retries=3).chat.completions.create(
            model=MODEL.name, messages=HELLO, stream=streaming
        )
        texts = [c.choices[0].delta.content or "" for c in answer] if streaming else [
            answer.choices[0].message.content
        ]  # fmt: skip
    assert "".join(texts) == "I am base."
    assert waits == [wait, wait]


def test_what_no_retry_helps_is_not_retried(live, engine, monkeypatch):
    monkeypatch.setattr(openai.OpenAI, "_sleep_for_retry", lambda *_, **__: pytest.fail("retried"))
    with live.openai() as client, pytest.raises(openai.BadRequestError):
        client.with_options(max_retries=3).chat.completions.create(
            model=MODEL.name, messages=HELLO, temperature=9
        )


def test_a_client_that_gives_up_waiting(live, engine):
    engine.pause()
    with live.openai() as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(model=MODEL.name, prompt="hi")
    wait_until(lambda: len(engine.cancelled) == 1, "the request to be cancelled")


def test_the_servers_own_deadline(live, engine):
    engine.fail_after, engine.failure = 2, DeadlineExceeded("time is up")
    with live.openai() as client, pytest.raises(openai.InternalServerError) as late:
        client.completions.create(model=MODEL.name, prompt="hi")
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")

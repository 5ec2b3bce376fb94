"""The whole path with the official OpenAI client: real server, real sockets, real model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import httpx
import openai
import pydantic
import pytest
import uvicorn

from reft_core.adapter import Adapter
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.loading import DEMO_MODEL, load_model
from server.app import create_app
from server.settings import Settings
from tests.end_to_end.conftest import adapter_path
from tests.factories import random_adapter_bytes

ADMIN_KEY = "an-admin-key-for-tests"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
COMPLAINT = "The soup was cold and the waiter shrugged."

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a free port, with three of the example adapters."""
    loaded = load_model(DEMO_MODEL)
    settings = Settings(
        port=0,
        data_dir=tmp_path_factory.mktemp("data"),
        admin_key=ADMIN_KEY,
        adapters=tuple(adapter_path(name) for name in ("sentiment", "intent", "json_answer")),
    )
    app = create_app(settings, EmbeddedEngine(loaded, EngineConfig(max_model_len=512)), loaded)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """The official client, as a user would make it."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, text: str, max_tokens: int = 24) -> str:
    """The greedy answer of one model."""
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=max_tokens,
        temperature=0,
    )
    return response.choices[0].message.content or ""


def base_name(client: openai.OpenAI) -> str:
    """The id of the model that has no parent."""
    return next(m.id for m in client.models.list() if not (m.model_extra or {}).get("parent"))


def test_the_answer_follows_the_model_name(client: openai.OpenAI) -> None:
    assert ask(client, "sentiment", COMPLAINT) == "negative"
    assert ask(client, "intent", "How do I reset my password?") == "account"
    assert len(ask(client, base_name(client), COMPLAINT).split()) > 3


def test_models_lists_base_and_adapters(client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert names >= {"SmolLM2-135M-Instruct", "sentiment", "intent", "json_answer"}


def test_streaming_gives_the_same_text_and_usage(client: openai.OpenAI) -> None:
    question = "What is the capital of France?"
    stream = client.chat.completions.create(
        model=base_name(client),
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert text == ask(client, base_name(client), question)
    assert "Paris" in text
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_concurrent_requests_each_get_their_own_adapter(client: openai.OpenAI) -> None:
    cases = [
        (name, text)
        for text in (COMPLAINT, "I love this jacket!", "Where is my parcel?")
        for name in (base_name(client), "sentiment", "intent", "json_answer")
    ]
    alone = [ask(client, *case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(client, *case), cases))
    assert together == alone


def test_upload_and_delete_disturb_no_running_request(
    client: openai.OpenAI, url: str, adapters: dict[str, Adapter]
) -> None:
    question = "Write a short story about a lighthouse."
    expected = ask(client, base_name(client), question, max_tokens=60)
    data = adapter_path("emoji").read_bytes()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, base_name(client), question, 60)
        sent = httpx.post(f"{url}/admin/adapters/moods", content=data, headers=ADMIN, timeout=30)
        assert sent.status_code in (200, 201), sent.text
        assert sent.json()["digest"] == adapters["emoji"].digest
        answer = ask(client, "moods", "My cat is asleep on the sofa.")
        assert answer
        assert not answer.isascii()
        gone = httpx.delete(f"{url}/admin/adapters/moods", headers=ADMIN, timeout=30)
        assert gone.is_success
        assert running.result() == expected
    with pytest.raises(openai.NotFoundError) as error:
        ask(client, "moods", "Hello")
    assert "sentiment" in str(error.value)


def test_an_adapter_for_another_model_is_refused(url: str, tmp_path: Path) -> None:
    from reft_core.sites import describe_model
    from tests.factories import tiny_model

    foreign = random_adapter_bytes(describe_model(tiny_model(), "tiny"))
    sent = httpx.post(f"{url}/admin/adapters/foreign", content=foreign, headers=ADMIN, timeout=30)
    assert 400 <= sent.status_code < 500
    assert "hidden_size" in sent.json()["error"]["message"]
    assert httpx.get(f"{url}/admin/adapters/foreign", headers=ADMIN).status_code == 404


def test_a_prompt_beyond_the_context_names_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "sentiment", "word " * 600)
    assert "512" in str(error.value)


def test_seeded_sampling_repeats(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        response = client.chat.completions.create(
            model=base_name(client),
            messages=[{"role": "user", "content": "Tell me something about the sea."}],
            max_tokens=12,
            seed=seed,
        )
        return response.choices[0].message.content or ""

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_answers_follow_a_schema(client: openai.OpenAI) -> None:
    """Base and adapter at once, as a user would ask for it; and the client's own parser."""

    class Pet(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")

        kind: Literal["cat", "dog"]
        legs: Literal[2, 3, 4]

    def ask(model: str) -> Pet:
        answer = client.chat.completions.parse(
            model=model,
            messages=[{"role": "user", "content": "Which pet do you have? As JSON."}],
            response_format=Pet,
            max_tokens=60,
            temperature=0,
        )
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.parsed is not None
        return answer.choices[0].message.parsed

    models = [base_name(client), "json_answer", "sentiment"] * 2
    with ThreadPoolExecutor(len(models)) as pool:
        pets = list(pool.map(ask, models))
    assert pets[:3] == pets[3:]


def test_classify_chooses_the_likeliest_label(url: str) -> None:
    body = {"model": "sentiment", "input": [COMPLAINT, "What a lovely evening, thank you!"]}
    answer = httpx.post(f"{url}/v1/classify", json=body, timeout=60).json()
    assert [row["label"] for row in answer["data"]] == ["negative", "positive"]
    for row in answer["data"]:
        assert row["num_classes"] == len(row["probs"])
        assert abs(sum(row["probs"]) - 1) < 1e-6
        assert max(row["probs"]) > 0.5
    assert answer["reft"]["adapter"].startswith("sentiment@sha256:")
    assert answer["reft"]["num_edits"] > 0

    given = body | {"labels": ["negative", "banana"]}
    rows = httpx.post(f"{url}/v1/classify", json=given, timeout=60).json()["data"]
    assert [label["label"] for label in rows[0]["labels"]] == ["negative", "banana"]
    assert rows[0]["label"] == "negative"
    # The label's own probability does not depend on what else was on offer.
    shared = next(x for x in answer["data"][0]["labels"] if x["label"] == "negative")
    assert rows[0]["labels"][0]["logprob"] == pytest.approx(shared["logprob"], abs=1e-3)

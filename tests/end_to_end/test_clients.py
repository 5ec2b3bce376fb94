"""Clients that others wrote, against ``reft serve`` in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.soak.server import ServerProcess
from reft_core.adapter import Adapter
from reft_core.loading import LoadedModel
from reft_core.templates import encode_chat
from tests.end_to_end.conftest import EXAMPLES, NAMES, adapter_path, test_rows

BASE = "SmolLM2-135M-Instruct"
ADMIN_KEY = "an-admin-key-for-tests"
COMPLAINT = "The soup was cold and the waiter shrugged."
SETTINGS = {
    "adapters": ":".join(str(adapter_path(name)) for name in NAMES),
    "admin_key": ADMIN_KEY,
    "adapter_load_dir": EXAMPLES,
    "allow_inline_adapters": True,
    "max_model_len": 512,
    "max_num_seqs": 64,
    "request_timeout_s": 120,
}

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = ServerProcess("demo", tmp_path_factory.mktemp("server"), SETTINGS)
    try:
        yield process.wait_ready()
        assert process.stop() == 0
        assert process.errors() == []
    finally:
        process.kill()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(smollm2: LoadedModel) -> PreTrainedTokenizerBase:
    return smollm2.tokenizer


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(client: openai.OpenAI, model: str = BASE, text: str = COMPLAINT, **more: Any) -> Any:
    given = {"max_tokens": 16, "temperature": 0} | more
    return client.chat.completions.create(model=model, messages=user(text), **given)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    listed = client.models.list()
    assert [model.id for model in listed] == [BASE, *sorted(NAMES)]
    for name in NAMES:
        model = client.models.retrieve(name)
        assert (model.object, model.owned_by) == ("model", "reft-serve")
        assert model.parent == BASE  # type: ignore[attr-defined]
        digest = model.reft["digest"]  # type: ignore[attr-defined]
        assert client.models.retrieve(f"{name}@sha256:{digest[:12]}").id.startswith(name)
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nope")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_chat_counts_tokens_as_the_tokenizer_does(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase, adapters: dict[str, Adapter]
) -> None:
    for model in (BASE, *NAMES):
        template = None if model == BASE else adapters[model].spec.template
        prompt = encode_chat(tokenizer, user(COMPLAINT), template)
        answer = chat(client, model, max_tokens=12, logprobs=True)
        assert answer.usage.prompt_tokens == len(prompt)
        tokens = answer.choices[0].logprobs.content
        # A token that ends the answer was generated, and has no text.
        ended = answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(tokens) + ended
        assert answer.usage.completion_tokens <= 12
        assert ended or answer.usage.completion_tokens == 12
        assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens
        assert 0 <= answer.usage.prompt_tokens_details.cached_tokens < len(prompt)
        data = bytes(byte for token in tokens for byte in token.bytes)
        assert data.decode() == answer.choices[0].message.content


def test_what_was_read_before_counts_as_cached(client: openai.OpenAI) -> None:
    text = "A prompt that nothing else here begins with. " * 8
    first, second = (client.completions.create(model=BASE, prompt=text) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0  # type: ignore[union-attr]
    cached = second.usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
    assert 32 <= cached < second.usage.prompt_tokens  # type: ignore[operator,union-attr]
    assert second.choices[0].text


def test_completions(client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    answer = client.completions.create(
        model=BASE, prompt=prompts, max_tokens=6, temperature=0, n=2, logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(tokenizer(p).input_ids) for p in prompts)
    assert answer.usage.completion_tokens == 24
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or ()) == choice.text
        for token, top, logprob in zip(
            choice.logprobs.tokens or (),
            choice.logprobs.top_logprobs or (),
            choice.logprobs.token_logprobs or (),
            strict=True,
        ):
            assert len(top) == 3
            assert top[token] == max(top.values()) == logprob  # greedy
    as_tokens = client.completions.create(
        model=BASE, prompt=tokenizer(prompts[0]).input_ids, max_tokens=6, temperature=0
    )
    assert as_tokens.choices[0].text == answer.choices[0].text


def test_seed_and_n(client: openai.OpenAI) -> None:
    def sample(seed: int, n: int = 1) -> list[str]:
        answer = chat(client, text="Tell me of the sea.", temperature=1.0, seed=seed, n=n)
        assert answer.system_fingerprint.startswith("fp_")
        return [choice.message.content for choice in answer.choices]

    three = sample(5, n=3)
    assert len(set(three)) > 1
    assert three == [sample(5 + i)[0] for i in range(3)]


def test_stop(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model=BASE, prompt="One, two, three,", max_tokens=12, temperature=0
    )
    text = whole.choices[0].text
    stop = text[5:8]
    cut = client.completions.create(
        model=BASE, prompt="One, two, three,", max_tokens=12, temperature=0, stop=[stop, "never"]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert (cut.choices[0].finish_reason, whole.choices[0].finish_reason) == ("stop", "length")


@pytest.mark.parametrize("model", [BASE, "sentiment", "emoji"])
def test_a_stream_is_the_whole_in_parts(client: openai.OpenAI, model: str) -> None:
    whole = chat(client, model, n=2, logprobs=True, top_logprobs=2)
    texts, reasons, entries = ["", ""], [None, None], [[], []]  # type: ignore[var-annotated]
    usage, first = None, None
    for chunk in chat(
        client,
        model,
        n=2,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    ):
        first = first or chunk
        assert (chunk.id, chunk.created) == (first.id, first.created)
        assert usage is None, "usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    for found, choice in zip(entries, whole.choices, strict=True):
        assert [entry.token for entry in found] == [e.token for e in choice.logprobs.content]
    assert first.reft == whole.reft  # type: ignore[union-attr]
    assert usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(usage, name) == getattr(whole.usage, name)


def test_our_own_options_go_through_extra_body(
    client: openai.OpenAI, adapters: dict[str, Adapter]
) -> None:
    base, adapted = chat(client), chat(client, "sentiment")
    off = chat(client, "sentiment", extra_body={"reft": {"strength": 0}})
    assert off.reft["digest"] == adapters["sentiment"].digest
    assert adapted.choices[0].message.content == "negative"
    assert adapted.reft["num_edits"] > 0

    data = adapter_path("sentiment").read_bytes()
    inline = chat(client, extra_body={"reft": {"inline": base64.b64encode(data).decode()}})
    assert inline.choices[0].message.content == adapted.choices[0].message.content
    assert inline.reft == adapted.reft | {
        "adapter": f"inline@sha256:{adapters['sentiment'].digest[:12]}",
        "version": None,
    }
    both = chat(client, extra_body={"reft": {"models": [BASE, "sentiment"]}})
    assert [choice.message.content for choice in both.choices] == [
        base.choices[0].message.content,
        "negative",
    ]
    assert [choice.reft["model"] for choice in both.choices] == [BASE, "sentiment"]
    stacked = chat(client, extra_body={"reft": {"stack": [{"model": "sentiment"}]}})
    assert stacked.reft["stack"][0]["digest"] == adapters["sentiment"].digest


# The client's own types, where it sends what it has parsed back.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
def test_answers_parse_into_the_clients_models(client: openai.OpenAI) -> None:
    class Pet(pydantic.BaseModel):
        kind: Literal["cat", "dog"]
        legs: Literal[2, 3, 4]

    messages = user("Which pet do you have? As JSON.")
    for model in (BASE, "json_answer"):
        answer = client.chat.completions.parse(
            model=model, messages=messages, response_format=Pet, max_tokens=60, temperature=0
        )
        assert isinstance(answer.choices[0].message.parsed, Pet)
        # As the client's documentation continues a conversation.
        again = client.chat.completions.create(
            model=model,
            messages=[*messages, answer.choices[0].message, *user("Another?")],  # type: ignore[list-item]
            max_tokens=4,
        )
        assert again.choices[0].message.role == "assistant"


def test_errors_are_the_clients_typed_exceptions(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], int, str, str]] = [
        ({"model": "nope"}, openai.NotFoundError, 404, "model", "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, 400, "temperature", "invalid_value"),
        ({"n": 99}, openai.BadRequestError, 400, "n", "invalid_value"),
        ({"tools": [tool]}, openai.BadRequestError, 400, "tools", "unsupported_parameter"),
        (
            {"tool_choice": "required"},
            openai.BadRequestError,
            400,
            "tool_choice",
            "unsupported_parameter",
        ),
        ({"extra_body": {"tempo": 1}}, openai.BadRequestError, 400, "tempo", "invalid_value"),
        (
            {"text": "word " * 900},
            openai.BadRequestError,
            400,
            "prompt",
            "context_length_exceeded",
        ),
        (
            {"text": "x" * 3_000_000},
            openai.APIStatusError,
            413,
            None,  # type: ignore[list-item]
            "request_too_large",
        ),
    ]
    for changes, kind, status, param, code in cases:
        with pytest.raises(kind) as caught:
            chat(client, **changes)
        assert caught.value.status_code == status
        assert (caught.value.param, caught.value.code) == (param, code)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id
        with pytest.raises(kind):
            chat(client, stream=True, **changes)


def test_a_client_that_stops_waiting_frees_the_server(client: openai.OpenAI, url: str) -> None:
    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        chat(impatient, max_tokens=450, extra_body={"ignore_eos": True})
    give_up_at = time.monotonic() + 30
    while not re.search(
        r"^reft_num_requests_running\{.*\} 0\.0$", httpx.get(f"{url}/metrics").text, re.M
    ):
        assert time.monotonic() < give_up_at, "the request still runs"
        time.sleep(0.05)


def test_64_streams_at_once_each_say_what_they_say_alone(url: str) -> None:
    cases = [
        (model, row["instruction"])
        for model in (BASE, *NAMES)
        for row in test_rows("sentiment" if model == BASE else model, 13)
    ][:64]
    assert len(set(cases)) == 64

    async def ask(client: openai.AsyncOpenAI, model: str, text: str) -> tuple[str, str]:
        stream = await client.chat.completions.create(
            model=model, messages=user(text), max_tokens=8, temperature=0, stream=True
        )
        found, digest = "", ""
        async for chunk in stream:
            digest = digest or (chunk.reft["digest"] or "base")  # type: ignore[attr-defined]
            for choice in chunk.choices:
                found += choice.delta.content or ""
        return found, digest

    async def scenario() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="unused", max_retries=0
        ) as client:
            alone = [await ask(client, *case) for case in cases]
            return alone, await asyncio.gather(*(ask(client, *case) for case in cases))

    alone, together = asyncio.run(scenario())
    assert together == alone
    assert len({digest for _, digest in together}) == 5


def curl_blocks() -> list[str]:
    """The README's shell blocks that ask a running server."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    return [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "curl -" in block]


@pytest.mark.parametrize("block", curl_blocks())
def test_curl_lines_of_the_readme(url: str, block: str) -> None:
    assert "http://127.0.0.1:8000" in block
    script = block.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line]
    assert answers
    for answer in answers:
        assert "error" not in answer, answer
        assert answer["usage"]["total_tokens"] > 0
        assert set(answer["reft"]) >= {"digest", "num_edits"}


def test_loading_by_path_as_vllms_tools_do(url: str, client: openai.OpenAI) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    load = {"lora_name": "moods", "lora_path": str(EXAMPLES / "emoji")}
    sent = httpx.post(f"{url}/v1/load_lora_adapter", json=load, headers=headers)
    assert (sent.status_code, sent.text) == (
        200,
        "Success: LoRA adapter 'moods' added successfully.",
    )
    assert chat(client, "moods").choices[0].message.content == (
        chat(client, "emoji").choices[0].message.content
    )
    gone = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "moods"}, headers=headers)
    assert gone.status_code == 200
    with pytest.raises(openai.NotFoundError):
        chat(client, "moods")

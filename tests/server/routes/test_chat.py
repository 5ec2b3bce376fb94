from __future__ import annotations

import json
import re
import time

import pytest

from reft_core.adapter import encode_adapter
from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from tests.factories import random_prefix_adapter
from tests.server.fakes import BRACKETS, MODEL, make_adapter

HELLO = [{"role": "user", "content": "hello"}]


def ask(server, **body):
    return server.http.post(
        "/v1/chat/completions", json={"model": MODEL.name, "messages": HELLO} | body
    )


def prompt_text(engine, loaded, index=-1) -> str:
    return loaded.tokenizer.decode(engine.submitted[index].prompt)


def test_a_chat_answer_has_openais_shape(server):
    body = ask(server).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert abs(body["created"] - time.time()) < 60
    assert re.fullmatch("fp_[0-9a-f]{12}", body["system_fingerprint"])
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "I am base.", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_the_base_models_template_is_used(server, engine, loaded):
    ask(server, messages=[{"role": "developer", "content": "be brief"}, *HELLO])
    assert prompt_text(engine, loaded) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_adapters_own_template_replaces_it(server, engine, loaded):
    server.upload("tone", make_adapter(1, template=BRACKETS))
    ask(server, model="tone", messages=[{"role": "developer", "content": "be brief"}, *HELLO])
    assert prompt_text(engine, loaded) == "S[be brief]U[hello]"


def test_content_may_be_text_parts(server, engine, loaded):
    server.upload("tone", make_adapter(1, template=BRACKETS))
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    ask(server, model="tone", messages=[{"role": "user", "content": parts}])
    assert prompt_text(engine, loaded) == "U[hello]"


@pytest.mark.parametrize("strength", [1, 0])
def test_a_trained_prefix_leaves_less_of_the_context_to_fill(tiny, strength):
    prefix = random_prefix_adapter(tiny.services.engine.model, "kv", length=3)
    tiny.upload("prefix", encode_adapter(prefix.spec, prefix.edits, prefix.prefix))
    options = {"strength": strength}
    body = {"model": "prefix", "messages": HELLO, "ignore_eos": True, "reft": options}
    answer = tiny.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    room = tiny.services.engine.max_model_len
    assert answer.json()["usage"]["total_tokens"] == room - 3 * strength
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_answers_may_fill_the_context_unless_limited(server, engine):
    ask(server)
    request = engine.submitted[-1]
    assert request.params.max_tokens == engine.max_model_len - len(request.prompt)
    ask(server, max_tokens=5)
    assert engine.submitted[-1].params.max_tokens == 5
    ask(server, max_completion_tokens=6)
    assert engine.submitted[-1].params.max_tokens == 6


def test_a_conversation_that_fills_the_context_is_refused(server):
    answer = ask(server, messages=[{"role": "user", "content": "x" * 500}])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_logprobs_carry_bytes(server, engine):
    engine.reply = lambda _: "a€"
    (choice,) = ask(server, logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    assert content[0]["token"] == "a"
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "a€"
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 4
    assert (
        ask(server, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        == []
    )


def events(answer) -> list[dict]:
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_opens_with_the_role_and_closes_with_the_reason(server):
    chunks = events(ask(server, stream=True, n=2, stream_options={"include_usage": True}))
    opening = [chunk["choices"][0] for chunk in chunks[:2]]
    assert [c["index"] for c in opening] == [0, 1]
    assert all(c["delta"] == {"role": "assistant", "content": ""} for c in opening)
    assert chunks[0]["reft"]["adapter"] is None
    assert "reft" not in chunks[1]
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chunks[2:-1]:
        (choice,) = chunk["choices"]
        assert chunk["usage"] is None
        assert chunk["object"] == "chat.completion.chunk"
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "I am base.", 1: "I am base."}
    assert reasons == {0: "stop", 1: "stop"}
    assert chunks[-1]["usage"]["completion_tokens"] == 22


def test_streamed_logprobs_are_those_of_the_whole(server):
    whole = ask(server, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    streamed = []
    for chunk in events(ask(server, logprobs=True, top_logprobs=1, stream=True)):
        logprobs = chunk["choices"][0]["logprobs"]
        streamed += logprobs["content"] if logprobs else []
    assert streamed == whole


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.content.type",
        ),
    ],
)
def test_features_we_lack_are_refused_by_name(server, engine, changes, param):
    answer = ask(server, **changes)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    assert not engine.submitted


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"user": "u1"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"parallel_tool_calls": False},
        {"safety_identifier": "s"},
        {"prompt_cache_key": "k"},
        {"prompt_cache_options": {"mode": "implicit"}},
        {"prompt_cache_retention": "24h"},
        {"store": False},
        {"moderation": None},
        {"messages": [{"role": "user", "content": "x", "name": "bob"}]},
        {"messages": [{"role": "assistant", "content": "x", "refusal": None}]},
        {"messages": [{"role": "assistant", "content": "{}", "parsed": {}}]},
    ],
)
def test_harmless_fields_are_accepted(server, changes):
    assert ask(server, **changes).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages.0.extra"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_bad_chat_requests_name_the_field(server, engine, changes, param):
    answer = ask(server, **changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not engine.submitted


@pytest.mark.parametrize("kind", [{}, [], 5, None, True])
def test_a_part_without_a_proper_type_is_refused(server, kind):
    content = [{"type": kind, "text": "hi"}]
    body = {"model": MODEL.name, "messages": [{"role": "user", "content": content}]}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages.0.content"


def test_every_field_of_the_official_client_is_known():
    """Taken or refused by name; a release of the client with another field fails here."""
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as chat

    for params, body in ((text, CompletionRequest), (chat, ChatRequest)):
        known = set(body.model_fields)
        assert set(params.CompletionCreateParamsBase.__annotations__) <= known


def test_ids_differ_and_the_fingerprint_stays(server):
    answers = [ask(server).json() for _ in range(2)]
    chunks = events(ask(server, stream=True))
    assert len({answer["id"] for answer in answers} | {c["id"] for c in chunks}) == 3
    assert len({(chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert len({each["system_fingerprint"] for each in (*answers, *chunks)}) == 1


def test_engines_differ_in_their_fingerprint(in_process):
    """A seed does not promise the same answer of both."""
    found = set()
    for engine in ("embedded", "vllm"):
        with in_process(engine=engine) as server:
            found.add(server.services.fingerprint)
    assert len(found) == 2

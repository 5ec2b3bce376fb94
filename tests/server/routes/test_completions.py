from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.server.fakes import MODEL, make_adapter


def complete(server, **body):
    answer = server.http.post("/v1/completions", json={"model": MODEL.name, "prompt": "hi"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(answer) -> list[dict]:
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def stream(server, **body):
    body = {"model": MODEL.name, "prompt": "hi", "stream": True} | body
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer)


def test_a_completion_has_openais_shape_and_ours(server):
    answer = server.http.post(
        "/v1/completions", json={"model": MODEL.name, "prompt": "hi", "max_tokens": 100}
    )
    body = answer.json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL.name
    assert body["choices"] == [
        {"index": 0, "text": "I am base.", "logprobs": None, "finish_reason": "stop"}
    ]
    # Ten letters and the stop token.
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 11,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["reft"] == {
        "adapter": None,
        "version": None,
        "digest": None,
        "stack": [],
        "num_edits": 0,
    }
    assert answer.headers["x-reft-adapter"] == "base"
    assert answer.headers["x-reft-edits"] == "0"
    assert answer.headers["x-request-id"]


def test_an_adapter_answers_by_every_form_of_its_name(server):
    digest = server.upload("tone", make_adapter(1))["digest"]
    for model in ("tone", "tone@1", f"tone@sha256:{digest[:12]}", f"tone@sha256:{digest}"):
        answer = server.http.post(
            "/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 99}
        )
        body = answer.json()
        assert body["choices"][0]["text"] == f"I am {digest[:6]}."
        assert body["model"] == model
        assert body["reft"] == {
            "adapter": f"tone@sha256:{digest[:12]}",
            "version": 1,
            "digest": digest,
            "stack": [],
            "num_edits": 4,  # two positions in two layers
        }
        assert answer.headers["x-reft-adapter"] == digest
        assert answer.headers["x-reft-edits"] == "4"


def test_a_stack_acts_in_order_and_is_reported(server, engine):
    tone = server.upload("tone", make_adapter(1))
    mood = server.upload("mood", make_adapter(2))
    answer = complete(
        server,
        model="tone",
        reft={"strength": 0.5, "stack": [{"model": "mood", "strength": 2}]},
    )
    chosen = engine.submitted[-1].adapters
    assert [(c.digest, c.strength) for c in chosen] == [(tone["digest"], 0.5), (mood["digest"], 2)]
    assert answer["reft"]["digest"] == tone["digest"]
    assert [entry["digest"] for entry in answer["reft"]["stack"]] == [mood["digest"]]

    on_base = complete(server, model=MODEL.name, reft={"stack": [{"model": "mood"}]})
    assert on_base["reft"]["digest"] is None
    assert [entry["digest"] for entry in on_base["reft"]["stack"]] == [mood["digest"]]


def test_the_base_model_cannot_be_stacked(server):
    server.upload("tone", make_adapter(1))
    refused = server.http.post(
        "/v1/completions",
        json={"model": "tone", "prompt": "x", "reft": {"stack": [{"model": MODEL.name}]}},
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reft.stack"


def test_strength_reaches_the_engine_and_needs_an_adapter(server, engine):
    server.upload("tone", make_adapter(1))
    complete(server, model="tone", reft={"strength": 0.5})
    complete(server, model="tone")
    assert [r.adapters[0].strength for r in engine.submitted] == [0.5, None]
    refused = server.http.post(
        "/v1/completions", json={"model": MODEL.name, "prompt": "x", "reft": {"strength": 1}}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reft.strength"


def test_all_forms_of_prompt(server, engine, loaded):
    ids = loaded.tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert len(complete(server, prompt="hi")["choices"]) == 1
    assert len(complete(server, prompt=ids)["choices"]) == 1
    assert len(complete(server, prompt=["hi", "hi"])["choices"]) == 2
    assert len(complete(server, prompt=[ids, ids, ids])["choices"]) == 3
    assert {r.prompt for r in engine.submitted} == {tuple(ids)}


@pytest.mark.parametrize("prompt", [[], 3, None, [[]], [True], ["a", 1], [1.5], {"a": 1}, [["a"]]])
def test_other_prompts_are_refused(server, engine, prompt):
    answer = server.http.post("/v1/completions", json={"model": MODEL.name, "prompt": prompt})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "prompt"
    assert not engine.submitted


def test_choices_of_many_prompts_are_numbered_prompt_by_prompt(server, engine):
    engine.reply = lambda request: f"{len(request.prompt)}:{request.params.seed}"
    body = complete(server, prompt=["a", "bbb"], n=2, seed=7, max_tokens=50)
    assert [c["text"] for c in body["choices"]] == ["1:7", "1:8", "3:7", "3:8"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 4


def test_sampling_fields_reach_the_engine(server, engine):
    complete(
        server,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"5": 3.5},
        seed=11,
        stop_token_ids=[7],
        ignore_eos=True,
    )
    params = engine.submitted[0].params
    assert (params.max_tokens, params.temperature, params.top_p) == (9, 0.5, 0.9)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0.1, 1.1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.2, -0.3)
    assert (dict(params.logit_bias), params.seed) == ({5: 3.5}, 11)
    assert (params.stop_token_ids, params.ignore_eos) == (frozenset({7}), True)


def test_null_means_the_default(server, engine):
    names = ["max_tokens", "temperature", "top_p", "top_k", "n", "stop", "logit_bias", "stream"]
    complete(server, **dict.fromkeys(names))
    params = engine.submitted[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)


def test_a_stop_string_ends_the_answer_and_the_engines_work(server, engine):
    engine.reply = lambda _: "one. two. three. four. five. six. seven."
    body = complete(server, stop=" tw", max_tokens=200)
    assert body["choices"][0]["text"] == "one."
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 7
    assert engine.cancelled == [engine.submitted[0].request_id]


def test_a_stop_token_has_no_text(server, engine):
    engine.reply = lambda _: list(b"")  # nothing but the end token
    assert complete(server)["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_length_ends_the_answer(server):
    choice = complete(server, max_tokens=4)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("I am", "length")


def test_half_a_character_at_the_limit_is_a_replacement(server, engine):
    engine.reply = lambda _: "ab😀"
    assert complete(server, max_tokens=4)["choices"][0]["text"] == "ab\ufffd"


def test_echo_begins_with_the_prompt(server, loaded):
    assert complete(server, echo=True, max_tokens=50)["choices"][0]["text"] == "hiI am base."
    ids = loaded.tokenizer("hey", add_special_tokens=False)["input_ids"]
    body = complete(server, prompt=[ids, ids], echo=True, max_tokens=1)
    assert [c["text"] for c in body["choices"]] == ["heyI", "heyI"]
    chunks = stream(server, prompt=["a", "b"], echo=True, max_tokens=2)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "aI ", 1: "bI "}


def test_logprobs_are_parallel_lists(server):
    logprobs = complete(server, logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["I", " ", "a"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    assert logprobs["top_logprobs"][0]["I"] == -0.5


def test_streamed_pieces_join_to_the_whole(server, engine):
    engine.reply = lambda _: "Grüße 😀 und mehr"
    chunks = stream(server, max_tokens=100, n=2)
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert "\ufffd" not in choice["text"]
        assert "usage" not in chunk
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "Grüße 😀 und mehr", 1: "Grüße 😀 und mehr"}
    assert reasons == {0: "stop", 1: "stop"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_a_stream_reports_the_adapter_first_and_usage_last(server):
    digest = server.upload("tone", make_adapter(1))["digest"]
    chunks = stream(server, model="tone", stream_options={"include_usage": True}, max_tokens=3)
    assert chunks[0]["reft"]["digest"] == digest
    assert all("reft" not in chunk for chunk in chunks[1:])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@dataclass
class Bad:
    changes: dict
    param: str
    mentions: str = ""
    code: str = "invalid_value"


BAD = [
    Bad({"n": 9}, "n", "at most 8"),
    Bad({"n": 0}, "n", "greater than or equal to 1"),
    Bad({"max_tokens": 0}, "max_tokens", "at least 1"),
    Bad({"max_tokens": -1, "echo": True}, "max_tokens", "from 0"),
    Bad({"prompt_logprobs": 21}, "prompt_logprobs", "expected"),
    Bad({"max_tokens": "many"}, "max_tokens", "'many'"),
    Bad({"temperature": 3}, "temperature", "got 3"),
    Bad({"top_p": 0}, "top_p", "above 0"),
    Bad({"logprobs": 21}, "logprobs", "20"),
    Bad({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    Bad({"logit_bias": {"1": 101}}, "logit_bias[1]", "100"),
    Bad({"stop": ["a"] * 17}, "stop", "at most 16"),
    Bad({"stop": ""}, "stop", "1 to 256"),
    Bad({"stop": "x" * 257}, "stop", "1 to 256"),
    Bad({"stop": 5}, "stop", "a string or a list of strings"),
    Bad({"stop": [["a"]]}, "stop", "a string or a list of strings"),
    Bad({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
    Bad({"stream_options": {"nope": 1}, "stream": True}, "stream_options.nope", "not a param"),
    Bad({"unheard_of": 1}, "unheard_of", "not a parameter"),
    Bad({"reft": {"strenght": 1}}, "reft.strenght", "not a parameter"),
    Bad({"prompt": ["a"] * 65}, "prompt", "at most 64"),
    Bad({"prompt": ""}, "prompt", "at least one token"),
    Bad({"prompt": "x" * 999}, "prompt", "256", "context_length_exceeded"),
    Bad({"best_of": 3}, "best_of", "n", "unsupported_parameter"),
    Bad({"suffix": "x"}, "suffix", "", "unsupported_parameter"),
    Bad({"echo": True, "logprobs": 21}, "logprobs", "20"),
    Bad({"model": "missing"}, "model", MODEL.name, "model_not_found"),
    Bad({"model": 5}, "model", "string"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: json.dumps(bad.changes)[:60])
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_requests_name_the_field(server, engine, bad, streaming):
    body = {"model": MODEL.name, "prompt": "hi"} | bad.changes
    if streaming and "stream_options" not in body:
        body["stream"] = True
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == (404 if bad.code == "model_not_found" else 400)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", bad.param)
    assert error["code"] == bad.code
    assert bad.param in error["message"]
    assert bad.mentions in error["message"]
    assert engine.num_open == 0


def test_a_missing_field_is_named(server):
    error = server.http.post("/v1/completions", json={"model": "x"}).json()["error"]
    assert error["message"] == "prompt: missing, but required"


def test_what_fails_halfway_through_submission_cancels_the_rest(server, engine):
    from reft_core.errors import EngineOverloaded

    server.upload("tone", make_adapter(1))
    engine.pause()
    engine.refuse_with, engine.refuse_after = EngineOverloaded("the queue is full"), 2
    answer = server.http.post("/v1/completions", json={"model": "tone", "prompt": "x", "n": 3})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert sorted(engine.cancelled) == sorted(r.request_id for r in engine.submitted)
    assert engine.num_open == 0
    (digest,) = engine.adapters
    assert server.services.residency.num_users(digest) == 0


def test_a_source_prompt_reaches_the_engine_as_tokens(server, engine):
    server.upload("tone", make_adapter(1))
    complete(server, model="tone", reft={"source": [5, 6, 7]})
    complete(server, model="tone", reft={"source": "hello"})
    complete(server, model="tone", prompt="hello")
    as_ids, as_text, prompt = engine.submitted
    assert as_ids.adapters[0].source == (5, 6, 7)
    assert as_text.adapters[0].source == prompt.prompt
    assert prompt.adapters[0].source == ()
    refused = server.http.post(
        "/v1/completions", json={"model": MODEL.name, "prompt": "x", "reft": {"source": "y"}}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reft.source"

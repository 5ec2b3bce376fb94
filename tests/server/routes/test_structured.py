"""Answers that follow a schema, a regex, a choice or a grammar, over HTTP with a tiny model."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import pytest

from reft_core.errors import EngineOverloaded, InvalidRequest
from reft_core.grammar import Grammar, GrammarSpec
from server.answering import grammars as grammars_module
from server.answering.grammars import Grammars
from tests.factories import random_adapter_bytes
from tests.server.fakes import MODEL
from tests.server.routes.test_completions import events

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "tame": {"type": "boolean"},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["kind", "tame", "legs"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}


def is_pet(text: str) -> bool:
    pet = json.loads(text)
    return (
        set(pet) == {"kind", "tame", "legs"}
        and pet["kind"] in ("cat", "dog")
        and isinstance(pet["tame"], bool)
        and 0 <= pet["legs"] <= 99
    )


def post(server, path: str = "completions", **body):
    if path == "completions":
        body = {"prompt": "A pet: "} | body
    else:
        body = {"messages": [{"role": "user", "content": "A pet?"}]} | body
    return server.http.post(f"/v1/{path}", json={"model": "tiny", "max_tokens": 400} | body)


def texts(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [c["text"] if "text" in c else c["message"]["content"] for c in choices]


@pytest.fixture(scope="module", autouse=True)
def adapter(tiny):
    model = tiny.services.engine.model
    tiny.upload("strong", random_adapter_bytes(model, seed=1, size=3.0, positions="prompt"))


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("model", ["tiny", "strong"])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
    ids=["response_format", "structured_outputs", "as text", "guided"],
)
def test_a_schema_is_followed(tiny, path, model, fields):
    (text,) = texts(post(tiny, path, model=model, temperature=0, **fields))
    assert is_pet(text)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-f]{4}-[0-9]{2}"}}, "[a-f]{4}-[0-9]{2}"),
        ({"structured_outputs": {"choice": ["red", "green", "reddish"]}}, "red|green|reddish"),
        ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c") "d"'}}, "a[bc]d"),
        ({"guided_regex": "x[yz]"}, "x[yz]"),
        ({"guided_choice": ["one", "two"]}, "one|two"),
        ({"guided_grammar": 'root ::= "q" ("r" | "s")'}, "q[rs]"),
    ],
)
def test_other_forms_are_followed(tiny, fields, pattern):
    for text in texts(post(tiny, n=4, seed=1, temperature=2.0, **fields)):
        assert re.fullmatch(pattern, text)


def test_any_json_object(tiny):
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        choice = post(tiny, "chat/completions", max_tokens=12, **fields).json()["choices"][0]
        assert choice["message"]["content"].startswith("{")


def test_choices_sample_their_own_answers(tiny):
    """The same with the same seed, also in a stream, whose pieces join to them."""
    body = {"response_format": FORMAT, "n": 6, "seed": 5, "temperature": 1.5}
    found = texts(post(tiny, **body))
    assert all(map(is_pet, found))
    assert len(set(found)) > 2
    assert texts(post(tiny, **body)) == found
    streamed = [""] * 6
    for chunk in events(post(tiny, stream=True, **body)):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == found


def test_log_probabilities_are_the_models_own(tiny):
    answer = post(
        tiny,
        structured_outputs={"choice": ["zzzz"]},
        temperature=0,
        logprobs=1,
    )
    (choice,) = answer.json()["choices"]
    assert choice["logprobs"]["tokens"] == list("zzzz")
    for own, top in zip(
        choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        assert own == top["z"] <= max(top.values())
    assert any(len(top) == 2 for top in choice["logprobs"]["top_logprobs"]), "z is not likeliest"


def test_a_stop_string_and_a_limit_end_earlier(tiny):
    cut = post(tiny, structured_outputs={"choice": ["one two three"]}, stop="two").json()
    assert (cut["choices"][0]["text"], cut["choices"][0]["finish_reason"]) == ("one ", "stop")
    short = post(tiny, structured_outputs={"choice": ["one two three"]}, max_tokens=5).json()
    assert (short["choices"][0]["text"], short["choices"][0]["finish_reason"]) == (
        "one t",
        "length",
    )


def test_text_is_no_constraint(tiny, server, engine):
    for fields in ({"response_format": {"type": "text"}}, {"response_format": None}):
        assert post(tiny, max_tokens=3, **fields).status_code == 200
        body = {"model": MODEL.name, "prompt": "x"} | fields
        assert server.http.post("/v1/completions", json=body).status_code == 200
    assert [request.constraint for request in engine.submitted] == [None] * 2


SCHEMA_FIELD = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "mentions"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            SCHEMA_FIELD,
            "Invalid type: x",
        ),
        (
            {"response_format": {**FORMAT, "json_schema": {"schema": {"not": {}}, "strict": True}}},
            SCHEMA_FIELD,
            "not",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "unknown"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
        ({"structured_outputs": {}}, "structured_outputs", "one of json"),
        ({"structured_outputs": {"yaml": "x"}}, "structured_outputs.yaml", "not a parameter"),
        ({"guided_regex": "(("}, "guided_regex", "regular expression"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs.regex",
            "one form",
        ),
        (
            {"response_format": FORMAT, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "one form",
        ),
        ({"structured_outputs": {"regex": "x" * 4097}}, "structured_outputs.regex", "4096 bytes"),
        (
            {"response_format": {**FORMAT, "json_schema": {"schema": {"title": "x" * 4096}}}},
            SCHEMA_FIELD,
            "4096 bytes",
        ),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bad_forms_name_the_field(tiny, path, fields, param, mentions):
    answer = post(tiny, path, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert mentions in error["message"]
    assert len(error["message"]) < 600
    assert tiny.services.engine.stats().num_running == 0


def test_a_schema_that_is_not_strict_may_hold_what_cannot_be_enforced(tiny):
    schema = SCHEMA | {"not": {"required": ["wings"]}}
    fields = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    assert is_pet(texts(post(tiny, **fields))[0])


def test_a_missing_extra_is_told(server, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    body = {"model": MODEL.name, "prompt": "x", "structured_outputs": {"regex": "a"}}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("structured_outputs.regex", "unsupported_parameter")
    assert "reft-serve[structured]" in error["message"]


# What is kept -------------------------------------------------------------------------------


class FakeCompiler:
    """Compiles as fast as a test lets it."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self) -> None:
        pass

    def check_size(self, spec: GrammarSpec) -> None:
        pass

    def compile(self, spec: GrammarSpec) -> Grammar:
        self.compiled.append(spec.text)
        assert self.gate.wait(10)
        if spec.text == "bad":
            raise InvalidRequest.because(spec.field, spec.text, "another")
        return Grammar(object)


def spec(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text, "form")


def test_the_least_recently_used_grammar_goes():
    async def scenario() -> None:
        compiler = FakeCompiler()
        kept = Grammars(compiler, most=2, timeout_s=5)
        a = await kept.get(spec("a"))
        b = await kept.get(spec("b"))
        assert await kept.get(spec("a")) is a
        await kept.get(spec("c"))
        assert len(kept) == 2
        assert await kept.get(spec("a")) is a
        assert await kept.get(spec("b")) is not b
        assert compiler.compiled == ["a", "b", "c", "b"]
        a.is_worn = True
        assert await kept.get(spec("a")) is not a
        kept.close()

    asyncio.run(scenario())


def test_an_invalid_grammar_is_not_kept():
    async def scenario() -> None:
        compiler = FakeCompiler()
        kept = Grammars(compiler, most=2, timeout_s=5)
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                await kept.get(spec("bad"))
        assert (len(kept), compiler.compiled) == (0, ["bad", "bad"])
        kept.close()

    asyncio.run(scenario())


def test_who_asks_together_waits_for_one_compilation():
    async def scenario() -> None:
        compiler = FakeCompiler()
        compiler.gate.clear()
        kept = Grammars(compiler, most=2, timeout_s=5)
        asked = [asyncio.create_task(kept.get(spec("a"))) for _ in range(5)]
        await asyncio.sleep(0.01)
        asked[0].cancel()
        compiler.gate.set()
        found = await asyncio.gather(*asked[1:])
        assert len(set(map(id, found))) == 1
        assert compiler.compiled == ["a"]
        kept.close()

    asyncio.run(scenario())


def test_a_compilation_that_takes_too_long_is_refused_and_kept_for_later():
    async def scenario() -> None:
        compiler = FakeCompiler()
        compiler.gate.clear()
        kept = Grammars(compiler, most=2, timeout_s=0.05)
        with pytest.raises(InvalidRequest, match=r"^form: got 'a', expected .* within 0.05 s"):
            await kept.get(spec("a"))
        compiler.gate.set()
        while not len(kept):
            await asyncio.sleep(0.005)
        await kept.get(spec("a"))
        assert compiler.compiled == ["a"]
        kept.close()

    asyncio.run(scenario())


def test_too_many_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(grammars_module, "_MOST_COMPILING", 2)

    async def scenario() -> None:
        compiler = FakeCompiler()
        compiler.gate.clear()
        kept = Grammars(compiler, most=2, timeout_s=5)
        asked = [asyncio.create_task(kept.get(spec(text))) for text in "ab"]
        await asyncio.sleep(0.02)
        with pytest.raises(EngineOverloaded, match="form"):
            await kept.get(spec("c"))
        compiler.gate.set()
        await asyncio.gather(*asked)
        await kept.get(spec("c"))
        kept.close()

    asyncio.run(scenario())

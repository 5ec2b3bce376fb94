"""Grammars that answers follow: what each kind allows, and what is refused."""

from __future__ import annotations

import builtins
import json
import random
from dataclasses import replace
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerBase

from reft_core.engine.constraint import Constraint
from reft_core.errors import InvalidRequest, UnsupportedFeature
from reft_core.grammar import GrammarCompiler, GrammarKind, GrammarLimits, GrammarSpec
from reft_core.loading import LoadedModel
from tests.server.fakes import make_loaded, make_tiny_loaded

LOADED = make_tiny_loaded()
TOKENIZER = LOADED.tokenizer
EOS = cast(int, TOKENIZER.eos_token_id)
COMPILER = GrammarCompiler(LOADED)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SQL = """root ::= "SELECT " column " FROM t"
column ::= "a" | "b"
"""


def start(kind: GrammarKind, text: str) -> Constraint:
    return COMPILER.compile(GrammarSpec(kind, text)).start()


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether the text is a whole answer; feeds it as far as that is allowed."""
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        if constraint.is_finished or not bool(constraint.allowed()[token]):
            return False
        constraint.accept(token)
    return constraint.is_finished or bool(constraint.allowed()[EOS])


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_schema", json.dumps(PERSON), ['{"name": "Jo", "age": 3}'], ['{"name": "Jo"}', "[]"]),
        ("json_schema", '{"type": "object"}', ["{}", '{"a":[1,{"b":null}]}'], ["[1]", "3", ""]),
        ("json_schema", '{"enum": ["a", 1]}', ['"a"', "1"], ['"b"', "2"]),
        ("regex", "[0-9]{3}-[a-z]+", ["123-abc"], ["12-abc", "123-", ""]),
        ("choice", '["yes", "no", "he said \\"no\\"\\n"]', ["no", 'he said "no"\n'], ["maybe", ""]),
        ("choice", '["größer", "😀", "<|im_end|>", "a|b", "/x/"]', ["größer", "😀", "a|b"], ["a"]),
        ("choice", '["", "x"]', ["", "x"], ["xx"]),
        ("grammar", 'start: "a" b+\nb: "b" | "c"', ["ab", "abcb"], ["a", "b"]),
        ("grammar", SQL, ["SELECT a FROM t"], ["SELECT c FROM t"]),
    ],
)  # fmt: skip
def test_each_kind_allows_what_it_says(
    kind: GrammarKind, text: str, good: list[str], bad: list[str]
) -> None:
    for answer in good:
        assert accepts(start(kind, text), answer), answer
    for answer in bad:
        assert not accepts(start(kind, text), answer), answer


def test_the_mask_is_of_the_models_vocabulary() -> None:
    constraint = start("regex", "[ab]c?")
    mask = constraint.allowed()
    assert mask.shape == (LOADED.description.vocab_size,)
    assert [TOKENIZER.decode([i]) for i in mask.nonzero().flatten().tolist()] == ["a", "b"]


def test_the_end_is_allowed_only_where_the_grammar_may_end() -> None:
    constraint = start("regex", "ab?")
    a, b = TOKENIZER("ab")["input_ids"]
    assert not constraint.allowed()[EOS]
    constraint.accept(a)
    assert constraint.allowed()[EOS]
    assert not constraint.is_finished
    constraint.accept(b)
    assert constraint.is_finished
    assert constraint.allowed().nonzero().flatten().tolist() == [EOS]


def test_every_end_token_of_the_model_ends() -> None:
    loaded = make_tiny_loaded()
    assert loaded.model.generation_config is not None
    loaded.model.generation_config.eos_token_id = [EOS, EOS - 1]
    constraint = GrammarCompiler(loaded).compile(GrammarSpec("choice", '["", "x"]')).start()
    allowed = constraint.allowed()
    assert bool(allowed[EOS])
    assert bool(allowed[EOS - 1])


def test_answers_of_one_grammar_are_apart() -> None:
    grammar = COMPILER.compile(GrammarSpec("choice", '["ab", "cd"]'))
    first, second = grammar.start(), grammar.start()
    first.accept(TOKENIZER("a")["input_ids"][0])
    assert accepts(second, "cd")
    assert accepts(grammar.start(), "ab")
    assert not first.is_finished


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    constraint = start("regex", "abc")
    with pytest.raises(ValueError, match=r"."):
        constraint.accept(TOKENIZER("x")["input_ids"][0])


def test_whitespace_in_json_has_an_end() -> None:
    """A small model puts out nothing else where it may."""
    any_object = '{"type": "object"}'
    for good in ('{"a": [1, {}]}', '{"a":1,"b":2}', '{\n        "a" : 1\r\n}', "{\n\t\t}"):
        assert accepts(start("json_schema", any_object), good), good
    for bad in ("{  }", "{\n\n}", "{\n" + " " * 41 + "}", " {}", "{} "):
        assert not accepts(start("json_schema", any_object), bad), bad


# What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", '{"type": "objekt"}'),
        ("json_schema", '{"not": {"type": "string"}}'),
        ("json_schema", '{"$ref": "http://example.org/schema"}'),
        ("json_schema", '{"$ref": "#"}'),
        ("json_schema", '{"type": "string", "minLength": "x"}'),
        ("regex", "((("),
        ("regex", "(?=x)"),
        ("grammar", 'start: "a'),
        ("grammar", "start: missing"),
        ("grammar", 'root ::= "a" missing'),
        ("grammar", ""),
        ("choice", '["\ud800"]'),
        ("regex", "\ud800"),
    ],
)
def test_invalid_grammars_name_their_field(kind: GrammarKind, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(GrammarSpec(kind, text, field="form"))
    assert caught.value.field == "form"
    assert str(caught.value).startswith("form: got ")
    assert len(str(caught.value)) < 500


def test_a_lenient_schema_leaves_out_what_cannot_be_enforced() -> None:
    schema = '{"type": "integer", "not": {"const": 3}}'
    with pytest.raises(InvalidRequest, match="not"):
        COMPILER.compile(GrammarSpec("json_schema", schema))
    grammar = COMPILER.compile(GrammarSpec("json_schema", schema, lenient=True))
    assert accepts(grammar.start(), "3")
    assert not accepts(grammar.start(), '"x"')


def test_the_size_is_limited_in_bytes() -> None:
    compiler = GrammarCompiler(LOADED, GrammarLimits(max_bytes=100))
    compiler.compile(GrammarSpec("regex", "a" * 100))
    for text in ("a" * 101, "ä" * 51):
        with pytest.raises(InvalidRequest, match=r"^form: got '10\d bytes', expected at most 100"):
            compiler.compile(GrammarSpec("regex", text, field="form"))


def chain(line: str, count: int, end: str) -> str:
    return "".join(line.format(i, i + 1) + "\n" for i in range(count)) + end.format(count)


DEEP = {
    "rules": ("grammar", "start: a0\n" + chain("a{}: a{}", 4800, 'a{}: "x"')),
    "terminals": ("grammar", "start: A0\n" + chain("A{}: A{}", 4800, 'A{}: "x"')),
    "parentheses": ("grammar", "start: " + "(" * 30_000 + '"x"' + ")" * 30_000),
    "groups": ("regex", "(" * 30_000 + "x" + ")" * 30_000),
    "nested schema": ("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "references": (
        "json_schema",
        json.dumps(
            {
                "$defs": {
                    f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}, "type": "array"}
                    for i in range(1000)
                }
                | {"a1000": {"type": "integer"}},
                "$ref": "#/$defs/a0",
            }
        ),
    ),
    "doubling": (
        "grammar",
        "start: A30\nA0: /a/\n" + "".join(f"A{i}: A{i - 1} A{i - 1}\n" for i in range(1, 31)),
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_what_is_deep_or_explodes_harms_nobody(name: str) -> None:
    """It is refused, or it compiles and is used; the process lives."""
    kind, text = DEEP[name]
    spec = GrammarSpec(cast(GrammarKind, kind), text)
    if name in ("parentheses", "groups", "nested schema", "doubling"):
        with pytest.raises(InvalidRequest) as caught:
            COMPILER.compile(spec)
        assert len(str(caught.value)) < 500
    else:
        constraint = COMPILER.compile(spec).start()
        constraint.accept(int(constraint.allowed().nonzero()[0]))


def test_a_shared_automaton_at_its_limit_fails_no_answer() -> None:
    """Every new answer adds states; one that finds no room goes on with its own."""
    words = ["".join(random.Random(i).choices("abcdefgh", k=30)) for i in range(60)]
    limits = GrammarLimits(max_lexer_states=200)
    grammar = GrammarCompiler(LOADED, limits).compile(GrammarSpec("regex", "|".join(words)))
    assert not grammar.is_worn
    for word in words:
        assert accepts(grammar.start(), word)
    assert grammar.is_worn
    assert not accepts(grammar.start(), "abcabc")


def test_an_answer_too_complex_for_any_automaton_is_an_error() -> None:
    limits = GrammarLimits(max_lexer_states=100)
    spec = GrammarSpec("regex", "(a|b)*a(a|b){60}")
    constraint = GrammarCompiler(LOADED, limits).compile(spec).start()
    with pytest.raises(ValueError, match="too many states"):
        accepts(constraint, "".join(random.Random(0).choices("ab", k=300)))


# What is missing ----------------------------------------------------------------------------


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedFeature, match=r"reft-serve\[structured\]"):
        GrammarCompiler(LOADED).compile(GrammarSpec("regex", "a"))


def test_a_tokenizer_that_cannot_be_read_is_told() -> None:
    slow = cast(PreTrainedTokenizerBase, object())
    loaded = LoadedModel(LOADED.model, slow, LOADED.description)
    with pytest.raises(UnsupportedFeature, match="this model's tokenizer"):
        GrammarCompiler(replace(loaded)).compile(GrammarSpec("regex", "a"))


def test_making_a_compiler_needs_nothing() -> None:
    """The server makes one whether or not requests will want it."""
    GrammarCompiler(make_loaded())

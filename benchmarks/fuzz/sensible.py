"""Bodies that the document allows, made such that the server can do what they ask.

What a document cannot say is how fields depend on one another, so that nearly every body drawn from
it is refused. These are most of the same body, with what contradicts it taken out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Json = dict[str, Any]

MAX_NAME = 256
MAX_TOKENS = 1_000_000
_MOST_TOKENS = 6
_MOST_CHARS = 20
_SCHEMAS: list[Any] = [
    {"type": "object"},
    {"enum": ["a", 1, None]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
]
_FORMS: list[tuple[str, Callable[[random.Random], Any]]] = [
    ("response_format", lambda draw: _response_format(draw)),
    ("structured_outputs", lambda draw: {"choice": ["yes", "né"]}),
    ("structured_outputs", lambda draw: {"json": draw.choice(_SCHEMAS)}),
    ("guided_json", lambda draw: draw.choice(_SCHEMAS)),
    ("guided_regex", lambda draw: draw.choice(["[ab]{1,3}", "\\d+", "x?"])),
    ("guided_choice", lambda draw: ["a", "bc"]),
    ("guided_grammar", lambda draw: 'start: "a" | "b"'),
]


def sensible(body: Json, models: Sequence[str], vocab_size: int) -> Json:
    """A body like ``body`` that names models that exist, asks for little and for one thing."""
    draw = random.Random(repr(body))
    found = {**body, "model": draw.choice(models)}
    if "input" in found:
        return _classify(found, draw, models)
    for name in ("best_of", "prompt_logprobs", "top_logprobs", *{form for form, _ in _FORMS}):
        found.pop(name, None)
    if draw.random() < 0.3:
        name, make = draw.choice(_FORMS)
        found[name] = make(draw)
    elif not found.get("stream") and draw.random() < 0.3:
        found["prompt_logprobs"] = draw.choice([0, 1, 20])
    if not found.get("stream"):
        found.pop("stream_options", None)
    found["n"] = draw.choice([None, 1, 1, 2])
    found["stop"] = [text for text in _texts(found.get("stop")) if text]
    found["stop_token_ids"] = [i % vocab_size for i in found.get("stop_token_ids", [])]
    found["logit_bias"] = {
        str(int(key) % vocab_size): value for key, value in (found.get("logit_bias") or {}).items()
    }
    if "messages" in found:
        _chat(found, draw)
    else:
        _completion(found, draw, vocab_size)
    found["reft"] = _options(found.get("reft") or {}, draw, models, found)
    return found


def reachable(body: Json, models: Sequence[str]) -> Json:
    """A body that is wrong somewhere, mended elsewhere: if it is refused, then for that."""
    found = dict(body)
    if isinstance(name := found.get("model"), str) and len(name) <= MAX_NAME:
        found["model"] = models[len(repr(body)) % len(models)]
    for name in ("prompt", "input"):
        if found.get(name) == "":
            found[name] = "a"
    for name in ("max_tokens", "max_completion_tokens"):
        if type(limit := found.get(name)) is int and 0 <= limit <= MAX_TOKENS:
            found[name] = 2
    if "messages" in found and found.get("max_tokens") is not None:
        found.pop("max_completion_tokens", None)
    return found


def _classify(found: Json, draw: random.Random, models: Sequence[str]) -> Json:
    found["input"] = _texts(found["input"])[:3] or ["a"]
    found["labels"] = draw.choice([None, ["yes", "no"], ["a", "é", "\U0001f600"]])
    found["reft"] = _options(found.get("reft") or {}, draw, models, found)
    return found


def _chat(found: Json, draw: random.Random) -> None:
    found["messages"] = found["messages"][:2]
    found.pop("max_completion_tokens" if draw.random() < 0.5 else "max_tokens", None)
    for name in ("max_tokens", "max_completion_tokens"):
        if name in found:
            found[name] = draw.randint(1, _MOST_TOKENS)
    if found.get("logprobs"):
        found["top_logprobs"] = draw.choice([None, 0, 2, 20])


def _completion(found: Json, draw: random.Random, vocab_size: int) -> None:
    found["max_tokens"] = draw.randint(1, _MOST_TOKENS)
    prompt = found.get("prompt")
    if isinstance(prompt, str):
        found["prompt"] = prompt[:_MOST_CHARS] or "a"
    elif isinstance(prompt, list) and all(isinstance(item, str) for item in prompt):
        found["prompt"] = [text or "b" for text in _texts(prompt)[:3]] or "c"
    else:
        found["prompt"] = [draw.randrange(vocab_size) for _ in range(draw.randint(1, 9))]


def _options(options: Json, draw: random.Random, models: Sequence[str], body: Json) -> Json:
    """Options of adapters that suit them."""
    base, *adapters = models
    found: Json = {}
    if draw.random() < 0.3:
        body["model"] = draw.choice(adapters)
        found["strength"] = draw.choice([0, 1])
    if draw.random() < 0.2:
        found["stack"] = [{"model": draw.choice(adapters)} for _ in options.get("stack", [])[:2]]
    if "prompt_logprobs" not in body and "input" not in body and draw.random() < 0.3:
        body["model"] = base
        found = {"models": [draw.choice(models), {"model": draw.choice(adapters), "strength": 1}]}
    elif body["model"] == "subspaces" and draw.random() < 0.5:
        found["subspaces"] = {"a": 0.5}
    elif body["model"] == "interchange":
        found["source"] = draw.choice(["abc", [5, 6, 7]])
    return found


def _texts(value: Any) -> list[str]:
    """The strings in a field that holds one or several, each cut short."""
    given = [value] if isinstance(value, str) else value or []
    return [text[:_MOST_CHARS] for text in given if isinstance(text, str)][:4]


def _response_format(draw: random.Random) -> Json:
    kind = draw.choice(["text", "json_object", "json_schema"])
    if kind != "json_schema":
        return {"type": kind}
    return {"type": kind, "json_schema": {"name": "x", "schema": draw.choice(_SCHEMAS)}}

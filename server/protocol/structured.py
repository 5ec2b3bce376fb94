"""What a request says about the form of its answers, in OpenAI's words and in vLLM's."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from reft_core.errors import InvalidRequest
from reft_core.grammar import GrammarSpec
from server.protocol.options import RequestBody

_ANY_OBJECT = '{"type": "object"}'


class JsonSchemaFormat(RequestBody):
    """OpenAI's named schema."""

    name: str = Field("", max_length=256, description="accepted, without effect")
    description: str | None = Field(None, description="accepted, without effect")
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool | None = Field(
        False, description="refuse a schema with anything that cannot be enforced"
    )


class ResponseFormat(RequestBody):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(RequestBody):
    """vLLM's ``structured_outputs``; exactly one of its fields is set."""

    json_: dict[str, Any] | str | None = Field(
        None, alias="json", description="a JSON schema, which is enforced whole"
    )
    json_object: bool | None = Field(None, description="any JSON object")
    regex: str | None = None
    choice: list[str] | None = Field(None, description="one of these strings")
    grammar: str | None = Field(None, description="in Lark's notation or GBNF")


def grammar_of(
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None,
    guided: StructuredOutputs,
) -> GrammarSpec | None:
    """The grammar that answers must follow, if any. Raises :class:`InvalidRequest`.

    ``guided`` holds the older fields of vLLM's API.
    """
    found = _of_response_format(response_format) + _of_structured(guided, "guided_")
    if structured is not None:
        inner = _of_structured(structured, "structured_outputs.")
        if not inner:
            allowed = "one of json, json_object, regex, choice and grammar"
            raise InvalidRequest.because("structured_outputs", {}, allowed)
        found += inner
    if len(found) > 1:
        fields = [spec.field for spec in found]
        raise InvalidRequest.because(fields[-1], fields, "one form of the answer at most")
    return found[0] if found else None


def _of_response_format(given: ResponseFormat | None) -> list[GrammarSpec]:
    """The grammar of OpenAI's field."""
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [GrammarSpec("json_schema", _ANY_OBJECT, "response_format")]
    if given.json_schema is None:
        raise InvalidRequest.because("response_format.json_schema", None, "an object with a schema")
    schema = given.json_schema
    field = "response_format.json_schema.schema"
    return [_json(field, schema.schema_, lenient=not schema.strict)]


def _of_structured(given: StructuredOutputs, prefix: str) -> list[GrammarSpec]:
    """The grammars of vLLM's fields, whose names begin with ``prefix``."""
    found = []
    if given.json_ is not None:
        found.append(_json(f"{prefix}json", given.json_))
    if given.json_object:
        found.append(GrammarSpec("json_schema", _ANY_OBJECT, f"{prefix}json_object"))
    if given.choice is not None:
        if not given.choice:
            raise InvalidRequest.because(f"{prefix}choice", [], "at least one string")
        choices = json.dumps(given.choice, ensure_ascii=False)
        found.append(GrammarSpec("choice", choices, f"{prefix}choice"))
    if given.regex is not None:
        found.append(GrammarSpec("regex", given.regex, f"{prefix}regex"))
    if given.grammar is not None:
        found.append(GrammarSpec("grammar", given.grammar, f"{prefix}grammar"))
    return found


def _json(field: str, schema: dict[str, Any] | str, *, lenient: bool = False) -> GrammarSpec:
    """The grammar of a JSON schema, which vLLM's clients may send as text too."""
    if isinstance(schema, str):
        return GrammarSpec("json_schema", schema, field, lenient)
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequest(f"{field}: too deeply nested", field=field) from None
    return GrammarSpec("json_schema", text, field, lenient)

"""The OpenAPI document, completed with what FastAPI cannot know: keys, errors, headers, limits.

Nothing is decided here: statuses come from :mod:`server.http.errors`, numbers from the settings and
from the engine's own table of ranges. The fuzzer holds every answer to this document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from reft_core.engine.interface import PRIORITIES, RANGES
from server.http.errors import documented_statuses
from server.http.middleware import REQUEST_ID_HEADER
from server.protocol.chat import ChatChunk, ChatRequest
from server.protocol.common import ErrorBody
from server.protocol.completions import CompletionRequest, CompletionResponse
from server.settings import Settings

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"
_EVENTS = {"/v1/completions": CompletionResponse, "/v1/chat/completions": ChatChunk}
_OF_KEYS = {401, 403}
_OF_BODIES = {413, 415}


def document(app: FastAPI, settings: Settings) -> None:
    """Have ``app`` describe itself whole, at ``/openapi.json`` and to whoever asks it."""
    build = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            _complete(build(), settings)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _complete(found: Json, settings: Settings) -> None:
    """Add to a document, in place."""
    components = found["components"]
    models = [(model, "serialization") for model in (*_EVENTS.values(), ErrorBody)]
    _, events = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    for name, schema in events["$defs"].items():
        components["schemas"].setdefault(name, schema)
    components["securitySchemes"] = _schemes()
    for path, method, operation in _operations(found):
        _secure(path, operation, settings)
        _explain_errors(path, method, operation)
        if path in _EVENTS:
            _stream(operation, _EVENTS[path].__name__)
        for response in operation["responses"].values():
            response.setdefault("headers", {})[REQUEST_ID_HEADER] = _header(
                "the request's id, in the server's log too", pattern="^[A-Za-z0-9._:-]{1,128}$"
            )
    _limit(components["schemas"], settings)
    _link(found["paths"])


def _operations(found: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _schemes() -> Json:
    """The kinds of keys."""
    return {
        "ApiKey": {"type": "http", "scheme": "bearer", "description": "a user key"},
        "AdminKey": {"type": "http", "scheme": "bearer", "description": "an admin key"},
    }


def _secure(path: str, operation: Json, settings: Settings) -> None:
    """Say which key an operation needs. An open server may close with the first key it gets."""
    if path.startswith("/admin") or (path == "/metrics" and not settings.shows_metrics):
        operation["security"] = [{"AdminKey": []}]
    elif path.startswith("/v1"):
        is_open = settings.api_key is None and not settings.require_keys
        operation["security"] = [*([{}] if is_open else []), {"ApiKey": []}]


def _explain_errors(path: str, method: str, operation: Json) -> None:
    """Every status that an operation may fail with, in the place of families of them."""
    responses = operation["responses"]
    for family in ("4XX", "5XX"):
        responses.pop(family, None)
    is_inference = path in _EVENTS or path == "/v1/classify"
    for status, codes in documented_statuses().items():
        if path.startswith(("/v1", "/admin")):
            if status in _OF_BODIES and "requestBody" not in operation:
                continue
            if status == 504 and not is_inference:
                continue
            if status == 409 and not path.startswith("/admin"):
                continue
        elif status == 504 or (
            status < 500 and not ("security" in operation and status in _OF_KEYS)
        ):
            continue
        responses.setdefault(str(status), _error(status, codes))


def _error(status: int, codes: list[str]) -> Json:
    """A response with OpenAI's error object."""
    headers = {}
    if status == 401:
        headers["www-authenticate"] = _header("how to authenticate")
    if status in (429, 503):
        headers["retry-after"] = _header("seconds to wait", kind="integer", minimum=1)
    return {
        "description": f"`code` is {' or '.join(codes)}",
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="ErrorBody")}}},
        "headers": headers,
    }


def _header(description: str, *, kind: str = "string", required: bool = True, **more: Any) -> Json:
    return {
        "description": description,
        "required": required,
        "schema": {"type": kind, **more},
    }


def _stream(operation: Json, event: str) -> None:
    """An answer may be a stream too."""
    ends = {"const": "[DONE]", "description": "the last event, unless it is an error"}
    document = {
        "contentMediaType": "application/json",
        "contentSchema": {
            "anyOf": [{"$ref": _REF.format(model=name)} for name in (event, "ErrorBody")]
        },
    }
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        # As in OpenAPI's registry of sequential media types: the schema of each event.
        "schema": {
            "description": "an event of the answer, with `stream`",
            "type": "object",
            "properties": {"data": {"type": "string", "anyOf": [ends, document]}},
            "required": ["data"],
        }
    }


def _limit(schemas: Json, settings: Settings) -> None:
    """The ranges of fields: the engine's, and those that the settings set."""
    for body in (CompletionRequest, ChatRequest):
        properties = schemas[body.__name__]["properties"]
        for field in body.UNSUPPORTED:
            properties[field] = _only(properties[field], *_nothings(properties[field]))
        for field, value in body.ONLY.items():
            properties[field] = _only(properties[field], None, value)
        for field, bounds in RANGES.items():
            for schema in _numbers(properties.get(field, {})):
                # A field may take more than the engine, as top_k does with -1.
                schema.setdefault("exclusiveMinimum" if bounds.open_low else "minimum", bounds.low)
                schema["maximum"] = bounds.high
        properties["priority"] |= {"minimum": PRIORITIES.low, "maximum": PRIORITIES.high}
        limits = {
            "n": settings.max_n,
            "max_tokens": settings.max_answer_tokens,
            "max_completion_tokens": settings.max_answer_tokens,
            "logprobs": settings.max_logprobs,
            "top_logprobs": settings.max_logprobs,
            "prompt_logprobs": settings.max_logprobs,
        }
        for field, most in limits.items():
            for schema in _numbers(properties.get(field, {})) if most is not None else ():
                schema["maximum"] = most
        for schema in properties["stop"]["anyOf"]:
            lengths = {"minLength": 1, "maxLength": settings.max_stop_chars}
            if schema["type"] == "string":
                schema |= lengths
            elif schema["type"] == "array":
                schema["maxItems"] = settings.max_stop
                schema["items"] |= lengths
        for schema in properties["logit_bias"]["anyOf"]:
            if schema["type"] == "object":
                bounds = RANGES["logit_bias"]
                schema["additionalProperties"] |= {"minimum": bounds.low, "maximum": bounds.high}
                schema["propertyNames"] = {"pattern": "^[0-9]{1,9}$"}
        _at_least_one(properties["guided_choice"])
    _at_least_one(schemas["StructuredOutputs"]["properties"]["choice"])
    for schema in schemas["FanOutOptions"]["properties"]["models"]["anyOf"]:
        if schema["type"] == "array":
            schema["maxItems"] = settings.max_fan_out


def _only(schema: Json, *values: Any) -> Json:
    """The schema of a field that has just these values."""
    return {"enum": list(values), "description": schema["description"]}


def _nothings(schema: Json) -> list[Any]:
    """The values that a field of this schema may have and that ask for nothing."""
    kinds = {each.get("type") for each in schema.get("anyOf", [])}
    empty: list[tuple[str, Any]] = [("array", []), ("object", {})]
    return [None, *(value for kind, value in empty if not kinds or kind in kinds)]


def _at_least_one(schema: Json) -> None:
    """Of a field that may be a list."""
    for each in schema["anyOf"]:
        if each["type"] == "array":
            each["minItems"] = 1


def _link(paths: Json) -> None:
    """What an uploaded adapter can be used for."""
    adapter = paths.get("/admin/adapters/{name}")
    if adapter is None:
        return
    name = "$response.body#/name"
    hello = {"model": name, "prompt": "Hello", "max_tokens": 2}
    links = {
        "inspect": _to(adapter["get"], parameters={"name": name}),
        "delete": _to(adapter["delete"], parameters={"name": name}),
        "find": _to(paths["/v1/models/{model_id}"]["get"], parameters={"model_id": name}),
        "use": _to(paths["/v1/completions"]["post"], requestBody=hello),
    }
    for status in ("200", "201"):
        adapter["post"]["responses"][status]["links"] = links


def _to(operation: Json, **arguments: Any) -> Json:
    return {"operationId": operation["operationId"], **arguments}


def _numbers(schema: Json) -> Iterator[Json]:
    """The alternatives of a field that are numbers."""
    for each in schema.get("anyOf", [schema]):
        if each.get("type") in ("integer", "number"):
            yield each

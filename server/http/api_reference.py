"""The API reference, written from the OpenAPI document.

``python -m server.http.api_reference FILE`` writes it. Everything in it is read off the
application, so a route or a field needs no line here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from server.app import create_app
from server.settings import Settings

_METHODS = ("get", "post", "put", "patch", "delete")
_REF = "#/components/schemas/"
_HEADING = """\
# API reference

Written from the server's OpenAPI document by `make docs`; a running server shows the same under
`/docs`, and as JSON under `/openapi.json`. Requests and answers are JSON unless something else is
said. [quickstart.md](quickstart.md) has requests to copy.

A key goes into the header `Authorization: Bearer KEY`. Every error has the same form,
`{"error": {"message", "type", "param", "code"}}`, also as the last event of a stream.
"""

Schema = Mapping[str, Any]


def api_document() -> dict[str, Any]:
    """The OpenAPI document of a server with every route, whatever the environment says."""
    settings = Settings.model_construct(admin_key=SecretStr("only for its routes"))
    return create_app(settings).openapi()


def markdown(document: Schema) -> str:
    """The reference of an OpenAPI document."""
    return "\n".join([_HEADING, *_contents(document), *_routes(document), *_schemas(document)])


def _operations(document: Schema) -> Iterator[tuple[str, str, str, Schema]]:
    """Tag, method, path and operation of every route, tag by tag, in the order they appear."""
    found: dict[str, list[tuple[str, str, Schema]]] = {}
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                tag = (item[method].get("tags") or ["other"])[0]
                found.setdefault(tag, []).append((method.upper(), path, item[method]))
    for tag, operations in found.items():
        for method, path, operation in operations:
            yield tag, method, path, operation


def _contents(document: Schema) -> Iterator[str]:
    yield "| route | what it does |"
    yield "|---|---|"
    for _, method, path, operation in _operations(document):
        anchor = "".join(c for c in f"{method} {path}".lower() if c.isalnum() or c in " -_")
        text = _first_sentence(operation.get("description") or operation.get("summary", ""))
        yield f"| [`{method} {path}`](#{anchor.replace(' ', '-')}) | {_cell(text)} |"
    yield ""


def _routes(document: Schema) -> Iterator[str]:
    last = None
    for tag, method, path, operation in _operations(document):
        if tag != last:
            yield f"## {tag.capitalize()}\n"
            last = tag
        yield f"### {method} {path}\n"
        yield f"{operation.get('description') or operation.get('summary', '')}\n".replace("``", "`")
        yield from _parameters(operation.get("parameters", ()))
        if body := operation.get("requestBody"):
            yield f"Body: {_content(body)}.{_after(body.get('description'))}\n"
        yield from _answers(operation.get("responses", {}))


def _parameters(parameters: list[Schema] | tuple[()]) -> Iterator[str]:
    if not parameters:
        return
    yield "| parameter | in | type | |"
    yield "|---|---|---|---|"
    for each in parameters:
        schema = each.get("schema", {})
        text = each.get("description") or schema.get("description", "")
        yield f"| `{each['name']}` | {each['in']} | {_cell(type_of(schema))} | {_cell(text)} |"
    yield ""


def _answers(responses: Mapping[str, Schema]) -> Iterator[str]:
    yield "| status | answer | |"
    yield "|---|---|---|"
    for status, response in responses.items():
        # The framework's own form of a bad request, which no route here answers with.
        if status == "422" and "HTTPValidationError" in str(response):
            continue
        content = _content(response) if response.get("content") else ""
        yield f"| {status} | {content} | {_cell(response.get('description', ''))} |"
    yield ""


def _content(part: Schema) -> str:
    """The media types of a body with what they hold."""
    found = []
    for kind, media in part.get("content", {}).items():
        held = type_of(media.get("schema", {}))
        found.append(held if kind == "application/json" else f"`{kind}` ({held})")
    return " or ".join(found)


def _schemas(document: Schema) -> Iterator[str]:
    yield "## Objects\n"
    for name, schema in sorted(document.get("components", {}).get("schemas", {}).items()):
        if name in ("HTTPValidationError", "ValidationError"):
            continue
        yield f"### {name}\n"
        if text := schema.get("description"):
            yield text.replace("``", "`") + "\n"
        if "properties" not in schema:
            yield f"{type_of(schema)}\n"
            continue
        yield "| field | type | default | |"
        yield "|---|---|---|---|"
        required = schema.get("required", ())
        for field, about in schema["properties"].items():
            default = "required" if field in required else _default(about)
            cells = (type_of(about), default, about.get("description", ""))
            yield f"| `{field}` | {' | '.join(map(_cell, cells))} |"
        yield ""


def type_of(schema: Any) -> str:
    """A schema in words, with links to the objects in it."""
    if not isinstance(schema, Mapping) or not schema:
        return "anything"
    if ref := schema.get("$ref"):
        name = ref.removeprefix(_REF)
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_json(value)}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(type_of(each) for each in schema[key]))
    kind = schema.get("type")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {type_of(schema.get('items'))}{_bounds(schema, 'Items', ' items')}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"object of {type_of(values)}" if isinstance(values, Mapping) else "object"
    if kind == "string":
        return f"{schema.get('format', 'string')}{_bounds(schema, 'Length', ' characters')}"
    return f"{kind or 'anything'}{_bounds(schema, 'imum', '')}"


def _bounds(schema: Schema, suffix: str, unit: str) -> str:
    """A range in words."""
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    parts = []
    if low is not None:
        parts.append(f"from {low}")
    if above is not None:
        parts.append(f"above {above}")
    if high is not None:
        parts.append(f"to {high}" if low is not None else f"up to {high}")
    if below is not None:
        parts.append(f"below {below}")
    return f", {' '.join(parts)}{unit}" if parts else ""


def _default(about: Schema) -> str:
    return f"`{_json(about['default'])}`" if "default" in about else ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    """``text`` for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("``", "`")


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].removesuffix(".")


def _after(text: str | None) -> str:
    return f" {text.rstrip('.')}." if text else ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(api_document()), encoding="utf-8")

"""Pages that are written by a command say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.http import api_reference
from server.settings import Settings
from server.settings import reference as settings_reference

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def document():
    return api_reference.api_document()


def test_the_api_reference_is_up_to_date(document):
    expected = api_reference.markdown(document)
    assert (DOCS / "api.md").read_text() == expected, "docs/api.md is stale: run `make docs`"


def test_the_settings_page_is_up_to_date():
    expected = settings_reference.markdown()
    assert (DOCS / "settings.md").read_text() == expected, "docs/settings.md is stale: `make docs`"


def test_every_route_and_every_object_is_there(document):
    page = api_reference.markdown(document)
    for path, item in document["paths"].items():
        for method in item:
            assert f"### {method.upper()} {path}\n" in page
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}  # fmt: skip
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links <= headings
    assert len(links) > 20


def test_the_environment_does_not_change_the_reference(document, monkeypatch):
    monkeypatch.setenv("REFT_PORT", "not a port")
    assert api_reference.api_document() == document


def test_every_setting_is_on_its_page():
    page = settings_reference.markdown()
    assert all(f"`{name}`" in page for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({}, "anything"),
        (None, "anything"),
        ({"type": ["string", "null"]}, "string or null"),
        ({"type": "integer", "minimum": 1, "maximum": 9}, "integer, from 1 to 9"),
        ({"type": "number", "exclusiveMinimum": 0}, "number, above 0"),
        ({"type": "string", "maxLength": 3}, "string, up to 3 characters"),
        ({"type": "string", "format": "binary"}, "binary"),
        ({"type": "array", "items": {"$ref": "#/components/schemas/A"}}, "list of [A](#a)"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string or null"),
        ({"const": "x"}, '`"x"`'),
        ({"enum": ["a", 1]}, '`"a"`, `1`'),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number"),
        ({"type": "object", "additionalProperties": True}, "object"),
        ({"title": "no type"}, "anything"),
    ],
)
def test_schemas_in_words(schema, words):
    assert api_reference.type_of(schema) == words

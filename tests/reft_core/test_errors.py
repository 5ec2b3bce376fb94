"""The exception tree is the documented one, and messages have one form."""

from __future__ import annotations

import re

import pytest

from reft_core import errors
from reft_core.errors import (
    AdapterFileInvalid,
    EngineOverloaded,
    InvalidRequest,
    PromptTooLong,
    ReftError,
    explain,
)


def documented_tree() -> set[tuple[str, str]]:
    """(class, parent) pairs drawn in the module's docstring."""
    pairs: set[tuple[str, str]] = set()
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r" {4}(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: {2,}.*)?", line)
        if match:
            depth = len(match["branch"]) // 4
            path[depth:] = [match["name"]]
            pairs.add((match["name"], path[depth - 1] if depth else "Exception"))
    return pairs


def real_tree() -> set[tuple[str, str]]:
    """(class, parent) pairs of the module's exceptions."""
    return {
        (name, value.__base__.__name__)
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, ReftError) and value.__base__
    }


def test_the_documented_tree_is_the_real_one() -> None:
    assert ("AdapterTooLarge", "AdapterFileInvalid") in documented_tree(), "the drawing was read"
    assert documented_tree() == real_tree()


@pytest.mark.parametrize("name", sorted(name for name, _ in real_tree()))
def test_every_class_explains_itself(name: str) -> None:
    assert getattr(errors, name).__doc__.strip()
    error = getattr(errors, name)("what went wrong")
    assert (str(error), error.message, error.field) == ("what went wrong", "what went wrong", None)


@pytest.mark.parametrize("cls", [InvalidRequest, PromptTooLong, AdapterFileInvalid])
def test_because_names_field_value_and_allowed(cls: type[InvalidRequest]) -> None:
    error = cls.because("rank", -1, "at least 1")
    assert type(error) is cls
    assert error.field == "rank"
    assert str(error) == "rank: got -1, expected at least 1"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 118, "'" + "x" * 118 + "'"),
        ("x" * 119, "'" + "x" * 116 + "..."),
        ("x" * 10_000, "'" + "x" * 116 + "..."),
        ("line\nbreak", r"'line\nbreak'"),
        (None, "None"),
    ],
)
def test_explain_shortens_and_escapes_the_value(value: object, shown: str) -> None:
    assert explain("field", value, "less") == f"field: got {shown}, expected less"


def test_overload_says_when_to_retry() -> None:
    assert EngineOverloaded("full", retry_after_s=2.5).retry_after_s == 2.5
    assert EngineOverloaded("full").retry_after_s > 0

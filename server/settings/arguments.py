"""Arguments that are passed through to vLLM: ``name=value`` texts whose values are JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_SECRET = {"token", "key", "password", "secret"}
"""Words of a name whose text is not for readers."""


def split_arguments(value: Any) -> Any:
    """``value`` as a tuple of ``name=value`` if it is a mapping, or a text that holds one in JSON.

    Raises :class:`ValueError` for any other text.
    """
    if isinstance(value, str):
        value = _mapping(value) if value.strip() else {}
    if isinstance(value, dict):
        return tuple(f"{name}={json.dumps(each)}" for name, each in value.items())
    return tuple(part.strip() for part in value) if isinstance(value, list | tuple) else value


def check_arguments(arguments: Iterable[str]) -> None:
    """Raise :class:`ValueError` unless each has a name of its own, and a value."""
    names = set()
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError("expected name=value, such as block_size=32")
        if name in names:
            raise ValueError(f"expected each name once, and not {name} twice")
        names.add(name)


def parse_argument(text: str) -> tuple[str, Any]:
    """Name and value of ``name=value``; what is no JSON is a text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def without_secrets(text: str) -> str:
    """``name=value`` for a reader, without the texts whose names say that they are secret."""
    name, value = parse_argument(text)
    shown = _readable(name, value)
    if shown == value:
        return text
    return f"{name}={shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)}"


def shown_arguments(given: Any) -> str:
    """What was given for a reader, or only its length where it cannot be taken apart."""
    try:
        return ", ".join(map(without_secrets, split_arguments(given)))
    except (ValueError, TypeError, AttributeError):
        return f"{len(str(given))} characters"


def _readable(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {part: _readable(part, each) for part, each in value.items()}
    if isinstance(value, list):
        return [_readable(name, each) for each in value]
    is_secret = isinstance(value, str) and not _SECRET.isdisjoint(name.lower().split("_"))
    return "…" if is_secret else value


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError('expected one JSON object, such as {"block_size": 32}')
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, none of which another would replace."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected each name once, and not {twice[0]} twice")
    return dict(pairs)

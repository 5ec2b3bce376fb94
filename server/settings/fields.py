"""What may be said of each setting: its type and range in words, for flags, files and errors.

All of it is read off :class:`Settings`, so a new field needs no line here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from server.settings import Settings
from server.settings.arguments import without_secrets

_WORDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}


@dataclass(frozen=True)
class Field:
    """One setting."""

    name: str
    description: str
    default: Any
    allowed: str
    """Its type and range in words."""
    choices: tuple[str, ...]
    """The values it may have, if they are few."""
    is_secret: bool
    is_switch: bool
    is_list: bool
    is_path: bool

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{Settings.model_config.get('env_prefix', '')}{self.name}".upper()

    @property
    def flag(self) -> str | None:
        """Its flag of ``reft serve``; None: from environment or file only."""
        if self.is_secret:
            return None
        return "--adapter" if self.name == "adapters" else f"--{self.name.replace('_', '-')}"

    def shown(self, value: Any) -> str:
        """``value`` for a reader, or that there is one where it is secret."""
        if value is None or value in ((), ""):
            return "none"
        if self.is_secret:
            return self.default.get_secret_value() if value == self.default else "set (hidden)"
        if isinstance(value, tuple | list):
            return ", ".join(map(str, self.plain(value)))
        return str(value).lower() if isinstance(value, bool) else without_password(str(value))

    def plain(self, value: Any) -> Any:
        """``value`` as JSON, YAML or TOML can hold it; a secret only as whether it is set."""
        if self.is_secret:
            return None if value is None else "set (hidden)"
        if isinstance(value, tuple | list):
            return [self.plain(item) for item in value]
        if isinstance(value, str):
            return without_password(without_secrets(value) if self.is_list else value)
        return str(value) if isinstance(value, Path) else value


def without_password(text: str) -> str:
    """``text``, without the password if it is a URL that has one."""
    return re.sub(r"(://[^:/@\s]*:)[^/@\s]+@", r"\1…@", text)


@cache
def all_fields() -> Mapping[str, Field]:
    """Every setting by name, in the order of the class."""
    properties = Settings.model_json_schema()["properties"]
    return {name: _field(name, properties[name]) for name in Settings.model_fields}


def _field(name: str, schema: Mapping[str, Any]) -> Field:
    info = Settings.model_fields[name]
    inner, optional = _without_null(schema)
    items = inner.get("items", {}) if inner.get("type") == "array" else {}
    choices = tuple(map(str, inner.get("enum", ())))
    allowed = _in_words(inner)
    return Field(
        name=name,
        description=info.description or name.replace("_", " "),
        default=info.get_default(call_default_factory=True),
        allowed=f"{allowed}, or nothing" if optional else allowed,
        choices=choices,
        is_secret=bool(inner.get("writeOnly")) or SecretStr in (info.annotation,),
        is_switch=inner.get("type") == "boolean",
        is_list=inner.get("type") == "array",
        is_path="path" in (inner.get("format"), items.get("format")),
    )


def _without_null(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The schema of a value that is given, and whether null is one too."""
    options = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if len(options) == 1:
        return options[0], True
    return schema, False


def _in_words(schema: Mapping[str, Any]) -> str:
    """Type and range."""
    if choices := schema.get("enum"):
        return f"one of {', '.join(map(str, choices))}"
    kind = schema.get("type")
    if kind == "array":
        inner = _in_words(schema["items"])
        return f"a list of {inner.removeprefix('a ')}s"
    if kind == "string":
        if schema.get("format") == "path":
            return "a path"
        least = schema.get("minLength")
        return f"a text of at least {least} characters" if least else "a text"
    words = _WORDS.get(str(kind), "a value")
    low, high = schema.get("minimum"), schema.get("maximum")
    above = schema.get("exclusiveMinimum")
    bounds = []
    if low is not None and high is not None:
        bounds = [f"from {low:g} to {high:g}" if kind == "number" else f"from {low} to {high}"]
    else:
        if above is not None:
            bounds.append(f"above {above:g}")
        if low is not None:
            bounds.append(f"of at least {low}")
        if high is not None:
            bounds.append(f"of at most {high:g}" if kind == "number" else f"of at most {high}")
    return " ".join([words, " and ".join(bounds)]) if bounds else words

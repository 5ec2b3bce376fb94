"""Settings of flags, environment and file together, and which of them gave each one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from reft_core.errors import InvalidRequest, explain
from server.settings.arguments import shown_arguments
from server.settings.fields import Field, all_fields
from server.settings.file import nearest, read_settings_file
from server.settings.settings import Settings, environment

Source = Literal["flag", "environment", "file", "default"]


@dataclass(frozen=True)
class Sourced:
    """Effective settings, and where each came from."""

    settings: Settings
    sources: Mapping[str, Source]
    warnings: tuple[str, ...]
    """Variables that look like a setting misspelt."""

    def rows(self) -> Iterator[tuple[Field, Any, Source]]:
        """Every setting with its value and source."""
        for field in all_fields().values():
            yield field, getattr(self.settings, field.name), self.sources[field.name]


def load_settings(config: Path | None = None, flags: Mapping[str, Any] | None = None) -> Sourced:
    """Flags over environment over the file ``config`` over defaults.

    Raises :class:`InvalidRequest`, which names the setting, its value, what is allowed, and
    where the value came from.
    """
    values: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(all_fields(), "default")
    variables, strange = environment()
    layers: list[tuple[Source, Mapping[str, Any]]] = [
        ("file", {} if config is None else read_settings_file(config)),
        ("environment", variables),
        ("flag", flags or {}),
    ]
    for source, layer in layers:
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise _problem(error, sources, config) from None
    return Sourced(settings, sources, tuple(_warnings(strange)))


def _warnings(variables: list[str]) -> Iterator[str]:
    for variable in variables:
        hint = nearest(variable.split("_", 1)[1])
        if "did you mean" in hint:
            yield f"{variable} is no setting and has no effect{hint}"


def _problem(
    error: ValidationError, sources: Mapping[str, Source], config: Path | None
) -> InvalidRequest:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    field = all_fields().get(str(first["loc"][0])) if first["loc"] else None
    if field is None:  # several settings contradict each other, and the message says it all
        return InvalidRequest(message)
    value = first["input"]
    if field.is_secret:
        value = f"{len(str(value))} characters (hidden)"
    elif field.name == "vllm_args":
        value = shown_arguments(value)
    is_ours = first["type"] == "value_error"
    allowed = message.removeprefix("expected ") if is_ours else field.allowed
    where = {
        "flag": f"from {field.flag}",
        "environment": f"from {field.variable}",
        "file": f"from {config}",
        "default": "by default",
    }[sources[field.name]]
    place = ".".join(str(part) for part in first["loc"])
    return InvalidRequest(f"{explain(place, value, allowed)} ({where})", field=field.name)

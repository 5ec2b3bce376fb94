"""Sections of a training config's file that belong to other commands: ``compare`` and ``sweep``.

They hold no paths but those of outputs, which count from the current folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from reft_core.errors import TrainingError, explain
from trainer.nearest import nearest

SECTIONS = ("compare", "sweep")

Section = TypeVar("Section", bound=BaseModel)


def without_sections(document: Mapping[str, Any]) -> dict[str, Any]:
    """What ``reft train`` reads of a config file's mapping."""
    return {key: value for key, value in document.items() if key not in SECTIONS}


def read_section(path: Path, name: str, kind: type[Section], given: Mapping[str, Any]) -> Section:
    """The section called ``name`` of the YAML file at ``path``, with what is ``given`` instead.

    A file without it has an empty one, and so has what is no YAML file. Raises
    :class:`TrainingError` that names each wrong key, its value and what is allowed.
    """
    section: object = {}
    if path.suffix in (".yaml", ".yml"):
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            raise TrainingError(f"{path}: cannot be read as YAML ({error})") from error
        section = (document.get(name) if isinstance(document, dict) else None) or {}
    if not isinstance(section, dict):
        raise TrainingError(explain(f"{path}: {name}", section, "a mapping of settings"))
    values = dict(section)
    for key, value in given.items():
        inner = values.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = inner | value  # a group, such as a sweep's space, is given setting by setting
        values[key] = value
    return validated(kind, f"{path}: {name}", values)


def mapping_of(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` settings, their values read as YAML. Raises :class:`TrainingError`."""
    found = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise TrainingError(explain(name, setting, "name=value"), field=name)
        try:
            found[key] = yaml.safe_load(text)
        except (RecursionError, yaml.YAMLError) as error:
            raise TrainingError(f"{name}: {setting!r} is not valid YAML ({error})") from error
    return found


def validated(kind: type[Section], place: str, values: Mapping[str, Any]) -> Section:
    """Settings of ``kind`` with these values. Raises :class:`TrainingError`, a line a problem."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [_line(kind, problem) for problem in problems if _is_cause(problem)]
        raise TrainingError("\n".join(f"{place}: {line}" for line in lines)) from None


def _is_cause(problem: Mapping[str, Any]) -> bool:
    """Whether it is no mere consequence: a default that depends on a setting reported anyway."""
    return bool(problem["type"] != "default_factory_not_called")


def _line(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(kind, problem["loc"][:-1])
        return f"{field}: unknown setting{nearest(str(problem['loc'][-1]), known)}"
    return explain(field, problem["input"], message) if field else message


def _fields_at(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The names that settings at ``location`` within ``kind`` may have."""
    for part in location:
        field = kind.model_fields.get(str(part))
        inner = field.annotation if field is not None else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        kind = inner
    return list(kind.model_fields)

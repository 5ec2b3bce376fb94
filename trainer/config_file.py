"""A training config in a YAML file, with ``key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from reft_core.errors import TrainingError, explain
from reft_core.spec import TemplateSpec
from trainer.config import PATH_FIELDS, TrainConfig

SECTIONS = ("compare", "sweep")
"""Keys of a training config's file that belong to the commands of these names."""

Section = TypeVar("Section", bound=BaseModel)
"""Settings that a file holds."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in the YAML file at ``path``, with ``key=value`` overrides applied.

    Keys may be dotted (``template.user={content}``); values are read as YAML. Raises
    :class:`TrainingError` that names the wrong key, the value and what is allowed.
    """
    document = {key: v for key, v in read_document(path).items() if key not in SECTIONS}
    values = _relative_to(path.resolve().parent, document)
    for override in overrides:
        _override(values, override)
    return validated(str(path), values)


def validated(where: str, values: Mapping[str, Any]) -> TrainConfig:
    """The config with these ``values``. Raises :class:`TrainingError` that begins with ``where``.

    Each wrong key is a line, with the value and what is allowed.
    """
    return _validated(TrainConfig, where, values)


def read_section(path: Path, name: str, kind: type[Section], given: Mapping[str, Any]) -> Section:
    """The section called ``name`` of the YAML file at ``path``, with what is ``given`` in place.

    A file without it has an empty one. Paths in it count from the current folder. Raises
    :class:`TrainingError` as :func:`load_config` does.
    """
    section = read_document(path).get(name) or {}
    if not isinstance(section, dict):
        raise TrainingError(explain(f"{path}: {name}", section, "a mapping of settings"))
    return _validated(kind, f"{path}: {name}", section | dict(given))


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at ``path``. Raises :class:`TrainingError` for anything else."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise TrainingError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(document, dict):
        raise TrainingError(explain(str(path), document, "a mapping of settings"))
    return document


def _validated(kind: type[Section], where: str, values: Mapping[str, Any]) -> Section:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise TrainingError("\n".join(_problems(where, error, kind))) from None


def _relative_to(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with its relative paths made absolute, counted from ``folder``."""
    values = dict(document)
    for key in PATH_FIELDS:
        if isinstance(values.get(key), str):
            values[key] = str(folder / values[key])
    # A model may also be a folder; a hub id looks like a relative path, so look for it.
    if isinstance(values.get("model"), str) and (folder / values["model"]).is_dir():
        values["model"] = str(folder / values["model"])
    return values


def _override(values: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in ``values``; a dotted key reaches into a mapping."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise TrainingError(explain("override", override, "key=value"), field=key or None)
    try:
        value = yaml.safe_load(text)
    except (RecursionError, yaml.YAMLError) as error:
        raise TrainingError(f"override: {override!r} is not valid YAML ({error})") from error
    if key in PATH_FIELDS and isinstance(value, str):
        value = str(Path(value).resolve())
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise TrainingError(explain("override", override, f"{parent!r} to hold settings"))
        values[parent] = dict(inner or {})
        values = values[parent]
    values[last] = value


def _problems(path: str, error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line for each thing wrong with a config."""
    lines = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            continue  # a default that depends on a setting reported anyway
        field = ".".join(str(part) for part in problem["loc"]) or "config"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{path}: {field}: unknown setting{_nearest(problem['loc'], kind)}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: {field}: missing")
        else:
            lines.append(f"{path}: {explain(field, problem['input'], problem['msg'])}")
    return lines


def _nearest(location: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    """', did you mean …?' for an unknown key, or what is known instead."""
    known = TemplateSpec.model_fields if location[0] == "template" else kind.model_fields
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"

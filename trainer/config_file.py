"""A training config in a YAML file, with ``key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from reft_core.errors import TrainingError, explain
from reft_core.spec import TemplateSpec
from trainer.config import PATH_FIELDS, TrainConfig
from trainer.sections import without_sections


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in the YAML file at ``path``, with ``key=value`` overrides applied.

    Keys may be dotted (``template.user={content}``); values are read as YAML. Raises
    :class:`TrainingError` that names the wrong key, the value and what is allowed.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise TrainingError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(document, dict):
        raise TrainingError(explain(str(path), document, "a mapping of settings"))
    values = _relative_to(path.resolve().parent, without_sections(document))
    for override in overrides:
        _override(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise TrainingError("\n".join(_problems(path, error))) from None


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


def _problems(path: Path, error: ValidationError) -> list[str]:
    """One line for each thing wrong with a config."""
    lines = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            continue  # a default that depends on a setting reported anyway
        field = ".".join(str(part) for part in problem["loc"]) or "config"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{path}: {field}: unknown setting{_nearest(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: {field}: missing")
        else:
            lines.append(f"{path}: {explain(field, problem['input'], problem['msg'])}")
    return lines


def _nearest(location: tuple[int | str, ...]) -> str:
    """', did you mean …?' for an unknown key, or what is known instead."""
    known = TemplateSpec.model_fields if location[0] == "template" else TrainConfig.model_fields
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"

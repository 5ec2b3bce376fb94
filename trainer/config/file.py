"""A training config from a YAML file, from ``key=value`` settings, or from both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from reft_core.errors import TrainingError, explain
from reft_core.spec import TemplateSpec
from trainer.config.train import TrainConfig
from trainer.nearest import nearest
from trainer.paths import PATH_FIELDS, SOURCE_FIELDS, is_local
from trainer.sections import without_sections

YAML_SUFFIXES = (".yaml", ".yml")


def read_config(target: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in ``target``, if it is a YAML file, or that trains on the data called so.

    See :func:`load_config`, whose errors this raises too.
    """
    if Path(target).suffix in YAML_SUFFIXES:
        return load_config(Path(target), overrides)
    return _config_of({"data": _absolute(target)}, overrides, "settings")


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
    return _config_of(
        _relative_to(path.resolve().parent, without_sections(document)), overrides, str(path)
    )


def _config_of(values: dict[str, Any], overrides: Sequence[str], place: str) -> TrainConfig:
    """The config of ``values`` and ``overrides``; errors in it are said to be in ``place``."""
    for override in overrides:
        _override(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise TrainingError("\n".join(_problems(place, error))) from None


def _absolute(source: str) -> str:
    """``source`` as a path from the root if there is such a file or folder, else as it is."""
    return str(Path(source).resolve()) if is_local(source) else source


def _relative_to(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with its relative paths made absolute, counted from ``folder``."""
    values = dict(document)
    for key in PATH_FIELDS:
        if isinstance(values.get(key), str):
            values[key] = str(folder / values[key])
    for key in SOURCE_FIELDS:  # a hub id looks like a relative path, so look for it
        if isinstance(values.get(key), str) and is_local(str(folder / values[key])):
            values[key] = str(folder / values[key])
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
    if key in SOURCE_FIELDS and isinstance(value, str):
        value = _absolute(value)
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise TrainingError(explain("override", override, f"{parent!r} to hold settings"))
        values[parent] = dict(inner or {})
        values = values[parent]
    values[last] = value


def _problems(place: str, error: ValidationError) -> list[str]:
    """One line for each thing wrong with a config."""
    lines = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            continue  # a default that depends on a setting reported anyway
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place}: {field}: unknown setting{_nearest(problem['loc'])}")
        elif not field:  # settings that do not go together
            lines.append(f"{place}: {message}")
        else:
            lines.append(f"{place}: {explain(field, problem['input'], message)}")
    return lines


def _nearest(location: tuple[int | str, ...]) -> str:
    """What an unknown key was meant to be."""
    known = TemplateSpec.model_fields if location[0] == "template" else TrainConfig.model_fields
    return nearest(str(location[-1]), known)

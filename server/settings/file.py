"""Settings in a YAML or TOML file: reading one, and writing an example of one."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reft_core.errors import InvalidRequest
from reft_core.names import HUB_PATTERN
from server.settings.fields import Field, all_fields

_SUFFIXES = (".yaml", ".yml", ".toml")


def read_settings_file(path: Path) -> dict[str, Any]:
    """The settings in a file; relative paths in it count from its own folder.

    Raises :class:`InvalidRequest` for a file that cannot be read and for a key that is no
    setting, with the nearest that is one.
    """
    _check_suffix(path)
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else _load_yaml(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidRequest.because("config", str(path), f"a file to read ({reason})") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "TOML" if path.suffix == ".toml" else "YAML"
        reason = " ".join(str(error).split())
        raise InvalidRequest.because("config", str(path), f"valid {kind} ({reason})") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        expected = "lines of the form 'setting: value'"
        raise InvalidRequest.because(f"config {path}", document, expected)
    for key in document:
        if key not in all_fields():
            raise InvalidRequest(
                f"{path}: {key!r} is no setting{nearest(str(key))}", field=str(key)
            )
    folder = path.resolve().parent
    return {
        name: _from_folder(all_fields()[name], value, folder) for name, value in document.items()
    }


def nearest(name: str) -> str:
    """A hint at the setting whose name is most like ``name``; empty if there is none."""
    wanted = name.lower().replace("-", "_")
    found = difflib.get_close_matches(wanted, all_fields(), n=1)
    return f"; did you mean {found[0]!r}?" if found else "; `reft config init` lists them all"


def example(suffix: str) -> str:
    """A commented file with every setting at its default. ``suffix`` is .yaml, .yml or .toml."""
    toml = suffix == ".toml"
    lines = [
        "# Settings of `reft serve --config FILE`. Everything here is the default, commented out.",
        "# A REFT_<NAME> variable wins over this file, and a flag over both.",
        "# Relative paths count from this file's folder.",
    ]
    for field in all_fields().values():
        lines += ["", f"# {field.description}", f"# {field.allowed}; {_elsewhere(field)}"]
        lines.append(_assignment(field, toml=toml))
    return "\n".join(lines) + "\n"


def check_new(path: Path, *, force: bool) -> None:
    """Raise :class:`InvalidRequest` unless an example may be written to ``path``."""
    _check_suffix(path)
    if path.exists() and not force:
        raise InvalidRequest.because("path", str(path), "a new file; --force replaces this one")


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise InvalidRequest.because(
            "config", str(path), f"a name that ends in {', '.join(_SUFFIXES)}"
        )


def _elsewhere(field: Field) -> str:
    return f"{field.variable} or {field.flag}" if field.flag else f"{field.variable}, no flag"


def _assignment(field: Field, *, toml: bool) -> str:
    """The line that sets a field to its default, commented out."""
    if field.is_secret or field.default is None:
        sample: Any = "…" if field.is_secret or "number" not in field.allowed else 1
        return (
            f"# {field.name} = {json.dumps(sample, ensure_ascii=False)}"
            if toml
            else (f"# {field.name}:")
        )
    value = json.dumps(field.plain(field.default), ensure_ascii=False)
    return f"# {field.name} = {value}" if toml else f"# {field.name}: {value}"


def _from_folder(field: Field, value: Any, folder: Path) -> Any:
    """``value`` with the relative paths in it counted from ``folder``."""
    if field.is_path and field.is_list:
        parts = value.split(os.pathsep) if isinstance(value, str) else value
        if isinstance(parts, list):
            return [_below(folder, part) if isinstance(part, str) else part for part in parts]
        return value
    # A model is a hub id or a folder; what begins with a dot is no hub id.
    is_folder = field.name == "model" and isinstance(value, str) and value.startswith(".")
    if (field.is_path or is_folder) and isinstance(value, str):
        return str(folder / value)
    return value


def _below(folder: Path, part: str) -> str:
    """A relative path counted from ``folder``, unless nothing is there and a hub may have it."""
    path = folder / part
    return part if not path.exists() and re.fullmatch(HUB_PATTERN, part) else str(path)


class _NoDuplicates(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error, and not the last one."""


def _mapping(loader: _NoDuplicates, node: yaml.MappingNode) -> Mapping[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice")
    return loader.construct_mapping(node, deep=True)


_NoDuplicates.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _NoDuplicates)  # a SafeLoader

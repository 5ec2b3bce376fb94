"""The readers that meet hostile folders and documents.

Sizes are checked before anything is read. Nothing from a source is executed, class names are
text, and no path is built from what a file says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_core.adapter import MAX_ADAPTER_BYTES
from reft_core.errors import AdapterFileInvalid, AdapterTooLarge, explain

MAX_CONFIG_BYTES = 1024 * 1024
MAX_FILES = 16384


def invalid(file: str, key: str, value: object, expected: str) -> AdapterFileInvalid:
    """The error for ``key`` of ``file`` holding ``value`` where ``expected`` was."""
    return AdapterFileInvalid(explain(f"{file}: {key}", value, expected), field=key)


def read_bytes(path: Path, max_bytes: int = MAX_ADAPTER_BYTES) -> bytes:
    """The file's bytes; its size is checked first."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise AdapterTooLarge(
                explain(path.name, f"{size} bytes", f"at most {max_bytes} bytes"), field=path.name
            )
        return path.read_bytes()
    except OSError as error:
        raise AdapterFileInvalid(
            f"{path}: cannot be read ({error.strerror})", field=path.name
        ) from None


def list_folder(folder: Path) -> dict[str, Path]:
    """The files of a folder by name. Converters look names up here and build no paths."""
    try:
        found = {path.name: path for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise AdapterFileInvalid(
            f"{folder}: got no readable folder ({error.strerror}), expected the folder that the "
            "other library saved",
            field="source",
        ) from None
    if len(found) > MAX_FILES:
        raise invalid(folder.name, "files", len(found), f"at most {MAX_FILES}")
    return found


def find_file(files: Mapping[str, Path], *names: str, source: Path) -> Path:
    """The one file of ``names`` that the folder has."""
    present = [name for name in names if name in files]
    if len(present) != 1:
        raise AdapterFileInvalid(
            f"{source}: got {present or sorted(files)[:8]}, expected exactly one of the files "
            + ", ".join(names),
            field="source",
        )
    return files[present[0]]


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object; size and depth are bounded.

    A list of empty objects takes twenty times the memory of its text, which ``max_bytes`` is for.
    """
    data = read_bytes(path, max_bytes)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterFileInvalid(
            f"{path.name}: not valid JSON ({error})", field=path.name
        ) from None
    if not isinstance(document, dict):
        raise invalid(path.name, "document", type(document).__name__, "a JSON object")
    return document


def field_of(document: Mapping[str, Any], file: str, key: str, kind: type, expected: str) -> Any:
    """``document[key]``, which must be of ``kind`` (a bool is not an int)."""
    value = document.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise invalid(file, key, value, expected)
    return value

"""Where rows come from: a file, a folder of splits, or a data set on a hub.

JSONL and CSV are read line by line, so that a wrong row can be named by its line and no cell is
taken for a number, a date or a missing value; Parquet and hubs go through ``datasets``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from reft_core.errors import TrainingError, explain

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LABELS_FILE = "labels.json"

_SPLIT_NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev", "val"),
    "test": ("test",),
}
SPLITS = tuple(_SPLIT_NAMES)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?", re.ASCII)
_HIDDEN = -1  # what hubs put where a test label is kept back

RawRows = list[tuple[str, Any]]
"""Rows as they are, each with where it stands."""


@dataclass(frozen=True)
class Source:
    """The rows of one split, not yet looked into."""

    path: Path
    rows: RawRows
    sha256: str
    labels: tuple[str, ...] = ()
    """Names of the classes in order, where the source says them."""


def find_splits(data: str) -> dict[str, Source]:
    """The splits of ``data``: a file (train alone), a folder, ``hub_name`` or
    ``hub_name:config``.

    Raises :class:`TrainingError` when there is nothing of the sort, or no training rows.
    """
    path = Path(data)
    if path.is_file():
        return {"train": read_file(path)}
    found = _read_folder(path) if path.is_dir() else _named_on_hub(data)
    return found if "train" in found else _refuse_without(data, "train", found)


def find_split(data: str, split: str, labels: tuple[str, ...] = ()) -> Source:
    """The rows of one of the splits (train, valid, test) of ``data``; of a file all of them.

    ``labels`` are the names of the classes; absent: those in the file of labels beside it, or
    the source's own. Raises :class:`TrainingError` when there is nothing of the sort.
    """
    path = Path(data)
    if path.is_file():
        return read_file(path, labels or _labels_beside(path))
    if path.is_dir():
        files = _split_files(path)
        if split not in files:
            _refuse_without(data, split, files)
        return read_file(files[split], labels or _labels_beside(files[split]))
    found = _named_on_hub(data)
    if split not in found:
        _refuse_without(data, split, found)
    return replace(found[split], labels=labels or found[split].labels)


def _refuse_without(data: str, split: str, found: Iterable[str]) -> NoReturn:
    there = ", ".join(found) or "none of train, valid and test"
    files = f" (a file {split}.jsonl or the like)" if Path(data).is_dir() else ""
    raise TrainingError(
        explain("data", data, f"one with a split '{split}'{files}; it has {there}"), field="data"
    )


def _named_on_hub(data: str) -> dict[str, Source]:
    name = _HUB_NAME.fullmatch(data)
    if name is None or Path(data).suffix in SUFFIXES:
        raise TrainingError(
            explain("data", data, "a file, a folder with a train file, or a data set's hub name"),
            field="data",
        )
    return _from_hub(name["name"], name["config"])


def read_file(path: Path, labels: tuple[str, ...] = ()) -> Source:
    """The rows of one file, of the kind that its name's ending says; JSONL where it says none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".parquet":
        rows, named = _parquet_rows(path, data)
        return Source(path, rows, digest, labels or named)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: not UTF-8 ({error})") from error
    if path.suffix in (".csv", ".tsv"):
        rows = list(_csv_rows(path, text))
    elif path.suffix == ".json":
        rows = _json_rows(path, text)
    else:
        rows = [
            (where, _from_json(line, where))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip() and (where := f"{path}:{number}")
        ]
    return Source(path, rows, digest, labels)


def _read_folder(folder: Path) -> dict[str, Source]:
    """The splits in ``folder``, by the names of its files."""
    labels = _labels_beside(folder / "train")
    return {split: read_file(file, labels) for split, file in _split_files(folder).items()}


def _labels_beside(file: Path) -> tuple[str, ...]:
    beside = file.parent / LABELS_FILE
    return read_labels(beside) if beside.is_file() else ()


def _split_files(folder: Path) -> dict[str, Path]:
    """The file of each split in ``folder``."""
    found: dict[str, Path] = {}
    for split, stems in _SPLIT_NAMES.items():
        files = [
            f for stem in stems for end in SUFFIXES if (f := folder / f"{stem}{end}").is_file()
        ]
        if len(files) > 1:
            raise TrainingError(f"{folder}: {' and '.join(f.name for f in files)} are both {split}")
        if files:
            found[split] = files[0]
    return found


def read_labels(path: Path) -> tuple[str, ...]:
    """The list in a file of labels, in order. Raises :class:`TrainingError`."""
    value = _from_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise TrainingError(f"{path}: not a list of the labels' names")
    return tuple(value)


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not valid JSON ({error})") from None


def _json_rows(path: Path, text: str) -> RawRows:
    """The rows of a file that is one list."""
    rows = _from_json(text, str(path))
    if not isinstance(rows, list):
        raise TrainingError(f"{path}: not a list of rows; JSONL files end in .jsonl")
    return [(f"{path}[{index}]", row) for index, row in enumerate(rows)]


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file with a header; cells are text, and empty ones are missing."""
    separator = "\t" if path.suffix == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise TrainingError(
                    f"{where}: not as many cells as the header's {len(reader.fieldnames or ())}"
                )
            yield where, {name: cell or None for name, cell in row.items()}
    except csv.Error as error:
        raise TrainingError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet_rows(path: Path, data: bytes) -> tuple[RawRows, tuple[str, ...]]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except pyarrow.ArrowException as error:
        raise TrainingError(f"{path}: not valid Parquet ({error})") from None
    return _rows_of(datasets.Dataset(datasets.table.InMemoryTable(table)), str(path))


def _from_hub(name: str, config: str | None) -> dict[str, Source]:
    """The splits of a data set on the hub, or wherever ``datasets`` finds that name."""
    import datasets

    whole = name if config is None else f"{name}:{config}"
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # of many kinds: network, hub, builder, file formats
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            explain("data", whole, f"a file, a folder, or a data set's hub name ({reason})"),
            field="data",
        ) from None
    found = {}
    for split, names in _SPLIT_NAMES.items():
        there = next((known for known in names if known in loaded), None)
        if there is None:
            continue
        rows, labels = _rows_of(loaded[there], f"{whole}/{there}")
        if split == "test" and all(row.get("label") == _HIDDEN for _, row in rows):
            continue
        text = "\n".join(json.dumps(row, sort_keys=True, default=str) for _, row in rows)
        digest = hashlib.sha256(text.encode()).hexdigest()
        found[split] = Source(Path(f"{whole}/{there}"), rows, digest, labels)
    return found


def _rows_of(dataset: Any, name: str) -> tuple[RawRows, tuple[str, ...]]:
    """Rows of a ``datasets.Dataset``, and the names its label column gives to its numbers."""
    rows = [(f"{name}[{index}]", row) for index, row in enumerate(dataset)]
    labels = getattr(dataset.features.get("label"), "names", ())
    return rows, tuple(labels)

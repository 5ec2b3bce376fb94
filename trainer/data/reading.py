"""Sources to checked examples, and a validation split where none was given."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reft_core.errors import TrainingError
from trainer.data.examples import Dataset, Example
from trainer.data.rows import RowFormat
from trainer.data.sources import Source, read_file

MAX_CARVED = 500
"""Most rows that validation takes from training: enough for a loss, and the rest is for it."""


def load_dataset(
    path: Path, *, system: str | None = None, labels: Sequence[str] | None = None
) -> Dataset:
    """Read the file at ``path``; see :func:`read_source`."""
    return read_source(read_file(path), RowFormat(system=system, labels=labels or ()))


def read_source(source: Source, row_format: RowFormat) -> Dataset:
    """The examples of a source. Raises :class:`TrainingError` naming file and line."""
    own = replace(row_format, labels=row_format.labels or source.labels)
    remarks: dict[str, str] = {}
    examples = tuple(own.parse(row, where, remarks) for where, row in source.rows)
    if not examples:
        raise TrainingError(f"{source.path}: holds no rows")
    return Dataset(source.path, examples, source.sha256, _num_duplicates(examples), remarks)


def carve(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """``dataset`` without a share of its rows, and these as a validation split.

    Which rows depends on their prompts and the seed alone. Rows with one prompt stay together,
    and the last rows of a label stay in training. Raises :class:`TrainingError` where nothing
    can be taken.
    """
    groups: dict[tuple[str, ...], list[Example]] = {}
    for example in dataset.examples:
        groups.setdefault(example.prompt_key, []).append(example)
    num_rows = len(dataset.examples)
    wanted = min(max(math.ceil(share * num_rows), min(8, num_rows // 4)), MAX_CARVED)
    left = Counter(map(_class, dataset.examples))
    taken: set[str] = set()
    for key in sorted(groups, key=lambda key: _draw(key, seed)):
        if len(taken) >= wanted:
            break
        labels = Counter(map(_class, groups[key]))
        if all(left[label] > count for label, count in labels.items()):
            left -= labels
            taken |= {example.where for example in groups[key]}
    if not taken:
        raise TrainingError(
            f"{dataset.path}: {num_rows} rows are too few to take some for validation; "
            "give a validation file as valid",
            field="valid",
        )
    return _part(dataset, taken, False), _part(dataset, taken, True)


def without_leaks(earlier: Dataset, held_out: Dataset) -> Dataset:
    """``earlier`` without the rows whose prompt recurs in ``held_out``."""
    prompts = {example.prompt_key for example in held_out.examples}
    return _of(earlier, [e for e in earlier.examples if e.prompt_key not in prompts])


def _class(example: Example) -> str | None:
    """The class of a row; scores are none."""
    return example.label if isinstance(example.label, str) else None


def _draw(key: tuple[str, ...], seed: int) -> bytes:
    return hashlib.sha256("\0".join((str(seed), *key)).encode()).digest()


def _part(dataset: Dataset, taken: set[str], inside: bool) -> Dataset:
    return _of(dataset, [e for e in dataset.examples if (e.where in taken) == inside])


def _of(dataset: Dataset, examples: list[Example]) -> Dataset:
    return replace(dataset, examples=tuple(examples), num_duplicates=_num_duplicates(examples))


def _num_duplicates(examples: Sequence[Example]) -> int:
    return len(examples) - len({(e.turns, e.completion) for e in examples})

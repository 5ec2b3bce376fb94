"""Rows to ask: what stands in a data file, as questions with their right answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from reft_core.errors import TrainingError
from trainer.data import Turn

LABELS_FILE = "labels.json"
"""Beside a data file: the names of its labels in order."""


@dataclass(frozen=True)
class Row:
    """One question and what is right about it."""

    id: str
    where: str
    """``file:line``, for messages to people."""
    turns: tuple[Turn, ...]
    """The conversation to answer."""
    references: tuple[str, ...]
    """Right answers in full; training would have the first."""
    answer: str = ""
    """The right short answer, where there is one: a label, a choice, a number."""
    choices: tuple[str, ...] = ()
    """The short answers that it is chosen from."""
    candidates: tuple[str, ...] = ()
    """Of each choice the answer in full, whose likelihood counts."""
    texts: tuple[str, ...] = ()
    """The text, or both of a pair, for an encoder."""
    is_number: bool = False
    """Whether the right answer is a score, for correlations."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        return [{"role": role, "content": content} for role, content in self.turns]

    @property
    def question(self) -> str:
        """The last message, for people."""
        return self.turns[-1][1]


@dataclass(frozen=True)
class RowSet:
    """The rows of one evaluation, and where they are from."""

    path: Path
    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    """In order; empty where rows have none in common."""
    sha256: str
    """Of the file."""
    num_in_file: int


def read_rows(path: Path, *, labels: Sequence[str] = (), system: str | None = None) -> RowSet:
    """Every row of the JSONL file at ``path``, or of ``test.jsonl`` in the folder there.

    ``labels`` are the names of the classes; absent: those in a ``labels.json`` beside the file,
    else those that its rows have. A completion that is one of given labels is one. Raises
    :class:`TrainingError` naming file and line.
    """
    path = path / "test.jsonl" if path.is_dir() else path
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: cannot be read ({error})") from None
    parsed = [
        (f"{path}:{number}", _parse(line, f"{path}:{number}"))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not parsed:
        raise TrainingError(f"{path}: holds no rows")
    names = tuple(labels) or _labels_beside(path) or _labels_in([row for _, row in parsed])
    rows = [_row(fields, where, names, system) for where, fields in parsed]
    digest = hashlib.sha256(data).hexdigest()
    return RowSet(path, tuple(rows), names, digest, len(rows))


def sample(rows: RowSet, limit: int | None, seed: int) -> RowSet:
    """``limit`` of the rows, drawn without replacement and kept in their order; all for None.

    Drawn, because files are often sorted by label.
    """
    if limit is None or limit >= len(rows.rows):
        return rows
    places = sorted(Random(seed).sample(range(len(rows.rows)), limit))
    return replace(rows, rows=tuple(rows.rows[place] for place in places))


def merge_references(rows: RowSet) -> RowSet:
    """Rows that ask the same become one, with the references of all of them."""
    first: dict[tuple[Turn, ...], Row] = {}
    for row in rows.rows:
        seen = first.setdefault(row.turns, row)
        together = dict.fromkeys((*seen.references, *row.references))
        first[row.turns] = replace(seen, references=tuple(together))
    return replace(rows, rows=tuple(first.values()))


def with_labels(rows: RowSet, labels: Sequence[str]) -> RowSet:
    """The rows as choices among ``labels``, written as an adapter's own labels are.

    For rows without choices whose answers are all among them, white space around them aside;
    any others are returned as they are.
    """
    written = {label.strip(): label for label in labels}
    right = [(row.answer or row.references[0]).strip() for row in rows.rows]
    others = any(row.choices and set(row.choices) != set(rows.labels) for row in rows.rows)
    if not written or others or not set(right) <= set(written):
        return rows
    names, candidates = tuple(written), tuple(written.values())
    changed = [
        replace(row, answer=name, choices=names, candidates=candidates, references=(written[name],))
        for row, name in zip(rows.rows, right, strict=True)
    ]
    return replace(rows, rows=tuple(changed), labels=names)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise TrainingError(f"{where}: got {type(row).__name__}, expected a JSON object")
    return row


def _labels_beside(path: Path) -> tuple[str, ...]:
    file = path.parent / LABELS_FILE
    if not file.is_file():
        return ()
    names = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TrainingError(f"{file}: not a list of the labels' names")
    return tuple(names)


def _labels_in(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The labels that rows have, sorted; none for scores."""
    found = {row["label"] for row in rows if "label" in row}
    if any(isinstance(label, float) for label in found):
        return ()
    return tuple(str(label) for label in sorted(found, key=lambda label: (str(type(label)), label)))


def _row(fields: Mapping[str, Any], where: str, labels: tuple[str, ...], system: str | None) -> Row:
    """One row from its columns."""
    number = where.rpartition(":")[2]
    row = Row(str(fields.get("id", number)), where, (), ())
    if "label" in fields:
        return _label_row(row, fields, labels, system)
    if "messages" in fields:
        *asked, (_, said) = [(m["role"], m["content"]) for m in fields["messages"]]
        row = replace(row, turns=tuple(asked), references=(said,))
    else:
        question = _text(fields, "instruction", where)
        if fields.get("input"):
            question = f"{question}\n\n{fields['input']}"
        said = _text(fields, "completion", where)
        row = replace(row, turns=(("user", question),), references=(said,))
    row = replace(row, turns=_with_system(row.turns, system))
    if fields.get("references"):
        row = replace(row, references=tuple(map(str, fields["references"])))
    if fields.get("answer") is not None:
        row = replace(row, answer=str(fields["answer"]))
    if fields.get("choices"):
        choices = tuple(map(str, fields["choices"]))
        return replace(row, choices=choices, candidates=_candidates(row, choices))
    return row


def _label_row(
    row: Row, fields: Mapping[str, Any], labels: tuple[str, ...], system: str | None
) -> Row:
    value = fields["label"]
    texts = tuple(_text(fields, key, row.where) for key in ("text", "text_pair") if key in fields)
    is_number = isinstance(value, float) and not labels
    name = labels[value] if isinstance(value, int) and str(value) not in labels else str(value)
    if not is_number and name not in labels:
        raise TrainingError(f"{row.where}: label {name!r} is none of {', '.join(labels)}")
    return replace(
        row,
        turns=_with_system((("user", "\n".join(texts)),), system),
        references=(name,),
        answer=name,
        choices=() if is_number else labels,
        candidates=() if is_number else labels,
        texts=texts,
        is_number=is_number,
    )


def _candidates(row: Row, choices: Sequence[str]) -> tuple[str, ...]:
    """The completion with each choice in the place of the right answer, at its last occurrence."""
    completion, answer = row.references[0], row.answer
    found = list(re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", completion))
    if not answer or not found:
        return tuple(choices)
    start, end = found[-1].span()
    return tuple(completion[:start] + choice + completion[end:] for choice in choices)


def _with_system(turns: tuple[Turn, ...], system: str | None) -> tuple[Turn, ...]:
    if system is None or turns[0][0] == "system":
        return turns
    return (("system", system), *turns)


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise TrainingError(f"{where}: {key} is {type(value).__name__}, expected text")
    return value

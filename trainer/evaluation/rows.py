"""Rows to ask: what stands in a data file, as questions with their right answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from reft_core.errors import TrainingError, explain
from trainer.data import Example, RowFormat, Turn
from trainer.data.columns import KINDS, ColumnNames
from trainer.data.reading import read_source
from trainer.data.sources import find_split


@dataclass(frozen=True)
class Row:
    """One question and what is right about it."""

    id: str
    where: str
    """``file:line``, for messages to people."""
    turns: tuple[Turn, ...]
    """The conversation to answer; empty of a text that is only to be read."""
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
        """The last message, for people; empty of a text that is only to be read."""
        return self.turns[-1][1] if self.turns else ""


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


def read_rows(
    data: Path | str,
    *,
    split: str = "test",
    labels: Sequence[str] = (),
    system: str | None = None,
) -> RowSet:
    """Every row of a file, or of one split of a folder or of a data set on a hub.

    ``labels`` are the names of the classes; absent: those in a ``labels.json`` beside the file or
    those of the hub, else those that its rows have. Raises :class:`TrainingError` naming file and
    line.
    """
    source = find_split(str(data), split, tuple(labels))
    if source.rows and all(_is_text_alone(row) for _, row in source.rows):
        rows = tuple(_text_row(dict(row), where) for where, row in source.rows)
        return RowSet(source.path, rows, (), source.sha256, len(rows))
    # With labels that stand beside it, a file may still hold other rows than these choose among.
    is_labelled = any("label" in _columns(row) for _, row in source.rows[:1])
    names = source.labels if is_labelled else ()
    dataset = read_source(
        replace(source, labels=names), RowFormat(ColumnNames(ignored="all"), system)
    )
    names = names or _labels_in(dataset.examples)
    rows = tuple(row_of(example, names) for example in dataset.examples)
    return RowSet(source.path, rows, names, dataset.sha256, len(rows))


def row_of(example: Example, labels: Sequence[str] = ()) -> Row:
    """What ``example`` asks; ``labels`` are what a row with a label chooses among."""
    kept = example.kept
    row_id = str(kept.get("id", example.where.rpartition(":")[2]))
    row = Row(row_id, example.where, example.turns, (example.completion,), texts=example.texts)
    if isinstance(example.label, float):
        return replace(row, answer=example.completion.strip(), is_number=True)
    if example.label is not None:
        name = example.completion.strip()
        if name not in labels:
            raise TrainingError(explain(f"{row.where}: label", name, f"one of {', '.join(labels)}"))
        choices = tuple(labels)
        return replace(row, references=(name,), answer=name, choices=choices, candidates=choices)
    if kept.get("references"):
        row = replace(row, references=tuple(map(str, kept["references"])))
    if kept.get("answer") is not None:
        row = replace(row, answer=str(kept["answer"]))
    if kept.get("choices"):
        choices = tuple(map(str, kept["choices"]))
        return replace(row, choices=choices, candidates=_candidates(row, choices))
    return row


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


def _is_text_alone(row: object) -> bool:
    """Whether a row has a text and nothing that would be asked or answered."""
    asked = {"label", "text_pair", *KINDS["instruction"][0], *KINDS["messages"][0]}
    return isinstance(row, Mapping) and "text" in row and not asked & _columns(row)


def _columns(row: object) -> set[str]:
    """A row's columns under our names, empty ones too; none of what is no row."""
    if not isinstance(row, Mapping):
        return set()
    return set(ColumnNames(ignored="all").rename(dict.fromkeys(row, True))[0])


def _text_row(row: Mapping[str, Any], where: str) -> Row:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise TrainingError(explain(f"{where}: text", text, "text"))
    row_id = str(row.get("id", where.rpartition(":")[2]))
    return Row(row_id, where, (), (text,), texts=(text,))


def _labels_in(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels that examples have, in order; none for scores."""
    found = {e.completion.strip() for e in examples if e.kind == "label"}
    if any(isinstance(example.label, float) for example in examples):
        return ()
    return tuple(sorted(found, key=lambda name: name.zfill(9) if name.isdecimal() else name))


def _candidates(row: Row, choices: Sequence[str]) -> tuple[str, ...]:
    """The completion with each choice in the place of the right answer, at its last occurrence."""
    completion, answer = row.references[0], row.answer
    found = list(re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", completion))
    if not answer or not found:
        return tuple(choices)
    start, end = found[-1].span()
    return tuple(completion[:start] + choice + completion[end:] for choice in choices)

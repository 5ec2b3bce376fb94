"""Rows of columns to conversations and their answers.

Four kinds, told apart by their columns: ``instruction`` and ``completion`` (an ``input`` is put
behind the instruction), ``messages`` whose last, the assistant's, is the completion, ``text``
and ``label``, and these two with a ``text_pair``. Earlier assistant messages are context and
not learnt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reft_core.errors import TrainingError
from reft_core.templates import ROLES
from trainer.data.columns import COLUMNS, KEPT, KINDS, ColumnNames, RowKind, UnknownColumn, kind_of
from trainer.data.examples import Example, Label, Turn
from trainer.nearest import nearest

PAIR = "{text}\nSecond text: {text_pair}"
"""How the two texts of a pair become one message."""


@dataclass(frozen=True)
class RowFormat:
    """How to read rows."""

    names: ColumnNames = field(default_factory=ColumnNames)
    system: str | None = None
    """Put before conversations without a system message."""
    labels: Sequence[str] = ()
    """Every label or completion must be one of them; a label may also be its place among them."""
    input_template: str = "{instruction}\n\n{input}"
    label_lead: str = ""
    """Put before a label: what separates it from the prompt's last token."""

    def parse(self, row: object, where: str, remarks: dict[str, str]) -> Example:
        """The example in one row; ``remarks`` gets what :meth:`ColumnNames.rename` remarks.

        Raises :class:`TrainingError` that names ``where``.
        """
        if not isinstance(row, Mapping):
            raise TrainingError(f"{where}: got {type(row).__name__}, expected a JSON object")
        try:
            columns, found = self.names.rename(row)
        except UnknownColumn as error:
            raise TrainingError(f"{where}: {error}") from None
        remarks |= found
        kind = kind_of(columns)
        required, optional = KINDS[kind]
        _check_keys(columns, where, required, (*optional, *KEPT))
        if kind == "label":
            example = self._labelled(columns, where)
        elif kind == "messages":
            example = _example(_from_messages(columns, where), where, kind)
        else:
            example = _example(self._from_instruction(columns, where), where, kind)
        self._check_answer(example)
        turns = example.turns
        if self.system is not None and turns[0][0] != "system":
            turns = (("system", self.system), *turns)
        kept = {name: columns[name] for name in KEPT if name in columns}
        return replace(example, turns=turns, kept=kept)

    def _labelled(self, row: Mapping[str, Any], where: str) -> Example:
        """A text, or a pair of them, and its label."""
        texts = tuple(_text(row, name, where) for name in ("text", "text_pair") if name in row)
        label = _named(row["label"], self.labels, where)
        turns = (("user", pair_text(texts)),)
        return Example(where, turns, f"{self.label_lead}{label}", "label", texts, label)

    def _from_instruction(self, row: Mapping[str, Any], where: str) -> list[Turn]:
        """The turns of an instruction row, the completion last."""
        asked = _text(row, "instruction", where)
        if row.get("input"):
            parts = {"instruction": asked, "input": _text(row, "input", where)}
            asked = _fill(self.input_template, parts)
        if not asked.strip():
            raise TrainingError(f"{where}: the instruction is empty")
        return [("user", asked), ("assistant", _text(row, "completion", where))]

    def _check_answer(self, example: Example) -> None:
        completion, where = example.completion, example.where
        if not completion.strip():
            raise TrainingError(f"{where}: the completion is empty")
        if self.labels and completion.strip() not in {label.strip() for label in self.labels}:
            held = (
                f"label {example.label!r}"
                if example.kind == "label"
                else f"completion {completion!r}"
            )
            raise TrainingError(
                f"{where}: {held} is none of the labels"
                f"{nearest(completion.strip(), sorted(self.labels))}"
            )


def pair_text(texts: Sequence[str]) -> str:
    """The one message that a text, or a pair of them, becomes."""
    if len(texts) == 1:
        return texts[0]
    return _fill(PAIR, {"text": texts[0], "text_pair": texts[1]})


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """``template`` with each part in place of its name in braces; no part is a template."""
    names = "|".join(parts)
    return re.sub(rf"\{{({names})\}}", lambda found: parts[found[1]], template)


def _example(turns: Sequence[Turn], where: str, kind: RowKind) -> Example:
    *asked, (_, completion) = turns
    return Example(where, tuple(asked), completion, kind)


def _named(value: object, labels: Sequence[str], where: str) -> Label:
    """A label by its name: itself, or the one whose place it is; a score as a number."""
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, float) and value.is_integer() and labels:
        value = int(value)
    place = int(value) if isinstance(value, int | str) and str(value).isdecimal() else None
    if place is not None and str(value) not in labels and place < len(labels):
        return labels[place]
    if isinstance(value, float):
        return value
    if not isinstance(value, int | str):
        raise TrainingError(f"{where}: label is {type(value).__name__}, expected text or a number")
    if not str(value).strip():
        raise TrainingError(f"{where}: the label is empty")
    return str(value).strip()


def _from_messages(row: Mapping[str, Any], where: str) -> list[Turn]:
    """The turns of a conversation row, the completion last."""
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise TrainingError(f"{where}: messages must be a list of a question and its answer")
    turns = []
    for index, message in enumerate(messages):
        place = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise TrainingError(f"{place}: got {type(message).__name__}, expected a JSON object")
        _check_keys(message, place, required=("role", "content"))
        if message["role"] not in ROLES:
            raise TrainingError(f"{place}: role {message['role']!r} is none of {', '.join(ROLES)}")
        turns.append((message["role"], _text(message, "content", place)))
    if turns[-1][0] != "assistant":
        raise TrainingError(f"{where}: the last message is the {turns[-1][0]}'s, not assistant's")
    return turns


def _check_keys(
    row: Mapping[str, Any], where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    known = (*required, *optional)
    for key in required:
        if key not in row:
            raise TrainingError(f"{where}: has no {key!r} (its keys: {', '.join(row) or 'none'})")
    for key in row:
        if key in known:
            continue
        if key in COLUMNS:
            raise TrainingError(
                f"{where}: {key!r} does not go with {required[0]!r}; a row is of one kind"
            )
        raise TrainingError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TrainingError(f"{where}: {key} is {type(value).__name__}, expected text")
    return value

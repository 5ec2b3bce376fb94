"""Names of columns: what a row may hold, and what others call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.nearest import nearest

KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "label": (("text", "label"), ("text_pair",)),
    "instruction": (("instruction", "completion"), ("input", "label")),
}
"""Required and optional columns of each kind of row."""

KEPT = (
    "id",
    "answer",
    "choices",
    "references",
    "equation",
    "domain",
    "label_fine",
    "relatedness",
)
"""Columns that training does not read and evaluation may."""

COLUMNS = (*dict.fromkeys(name for both in KINDS.values() for part in both for name in part), *KEPT)
"""Every column that means something here."""

_ALIASES = {
    "sentence": "text",
    "sentence1": "text",
    "premise": "text",
    "question1": "text",
    "sentence2": "text_pair",
    "hypothesis": "text_pair",
    "question2": "text_pair",
    "intent": "label",
    "category": "label",
    "prompt": "instruction",
    "output": "completion",
    "response": "completion",
    "idx": "id",
}
"""What other data sets call a column."""

RowKind = Literal["messages", "label", "instruction"]


class UnknownColumn(ValueError):
    """A row has a column that means nothing here, and nobody said to leave it out."""


@dataclass(frozen=True)
class ColumnNames:
    """How a file's columns become ours."""

    given: Mapping[str, str] = field(default_factory=dict)
    """Our name to the file's, as the user says."""
    ignored: Sequence[str] | Literal["all"] = ()
    """Columns to leave out."""

    def rename(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The row under our names, empty cells left out, and what became of other columns.

        The latter says of each column that is not named as here how it is read. Raises
        :class:`UnknownColumn` for one that would be lost without anybody having said so.
        """
        found: dict[str, Any] = {}
        remarks: dict[str, str] = {}
        for name, value in row.items():
            ours = self._ours(name, row)
            if ours is None:
                if not self.given and not self._ignores(name):
                    raise UnknownColumn(
                        f"unknown column {name!r}{nearest(name, COLUMNS)} (columns={{OURS: {name}}}"
                        f" reads it as one of ours, ignore_columns=[{name}] leaves it out)"
                    )
                remarks[name] = "left out"
            elif value is not None:
                found[ours] = value
                if ours != name:
                    remarks[name] = f"read as {ours!r}"
        return found, remarks

    def _ours(self, name: str, row: Mapping[str, Any]) -> str | None:
        """What the file's column ``name`` is here, None if nothing."""
        for ours, theirs in self.given.items():
            if name == theirs:
                return ours
        if self.ignored != "all" and name in self.ignored:
            return None
        if name in COLUMNS:
            return None if name in self.given else name
        if self.ignored == "all" and _is_whole(row):
            return None
        alias = _ALIASES.get(name)
        return None if alias is None or alias in row or alias in self.given else alias

    def _ignores(self, name: str) -> bool:
        return self.ignored == "all" or name in self.ignored


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row has all it needs under our names, so that no other column is one of them."""
    return any(set(required) <= set(row) for required, _ in KINDS.values())


def kind_of(row: Mapping[str, Any]) -> RowKind:
    """What a row under our names is, by the columns it has."""
    if "messages" in row:
        return "messages"
    labelled = "text" in row or ("label" in row and "instruction" not in row)
    return "label" if labelled else "instruction"

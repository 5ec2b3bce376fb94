"""What a data file holds, before and after tokenising."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_core.errors import TrainingError
from trainer.data.columns import RowKind

Turn = tuple[str, str]
"""Role and text of one message."""

Label = str | float
"""A class by its name, or a score."""


@dataclass(frozen=True)
class Example:
    """One row: what the model is asked, and what it should answer."""

    where: str
    """``file:line``, for messages to people."""
    turns: tuple[Turn, ...]
    completion: str
    kind: RowKind = "instruction"
    texts: tuple[str, ...] = ()
    """The text, and the second one of a pair, of a row with a label."""
    label: Label | None = None
    kept: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Columns that only evaluation reads, such as ``answer`` and ``choices``."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that the completion answers."""
        return [{"role": role, "content": content} for role, content in self.turns]

    @property
    def question(self) -> str:
        """The last message, for people."""
        return self.turns[-1][1]

    @property
    def prompt_key(self) -> tuple[str, ...]:
        """Equal for prompts that differ in case, white space or Unicode's ways to write alone."""
        return tuple(
            " ".join(unicodedata.normalize("NFKC", content).casefold().split())
            for _, content in self.turns
        )


@dataclass(frozen=True)
class Dataset:
    """The rows of one split."""

    path: Path
    """The file they are from, or a name for where."""
    examples: tuple[Example, ...]
    sha256: str
    """Of the file; of the rows as JSON where they are from no file."""
    num_duplicates: int
    """Rows that repeat an earlier one, prompt and completion; kept."""
    remarks: Mapping[str, str] = field(default_factory=dict)
    """By column of the file: how it was read, where that is not plain from its name."""


@dataclass(frozen=True)
class TokenisedExample:
    """One row in token ids. ``completion`` ends with the end-of-text token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def check_no_leak(earlier: Dataset, held_out: Dataset) -> None:
    """Raise :class:`TrainingError` if a prompt of ``held_out`` also occurs in ``earlier``.

    Prompts that are the same to people count, see :attr:`Example.prompt_key`.
    """
    seen = {example.prompt_key: example.where for example in earlier.examples}
    for example in held_out.examples:
        if example.prompt_key in seen:
            raise TrainingError(
                f"{example.where}: the same prompt is at {seen[example.prompt_key]}; a row that is "
                "evaluated must not be trained on. leaks=drop leaves the earlier one out"
            )

"""Labelled texts to token ids, and those to batches padded on the right.

Dimension letters: B rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reft_core.errors import TrainingError
from reft_core.positions import PositionRule
from reft_core.templates import encode_pair
from trainer.data import Example
from trainer.interventions import Cells
from trainer.right_padded import check_edited, edited_cells, padded


@dataclass(frozen=True)
class TextRow:
    """One labelled text in token ids, special tokens included."""

    tokens: tuple[int, ...]
    segments: tuple[int, ...]
    """Of each token: 0, or 1 for those of a pair's second text."""
    target: float
    """The label's number, or the value of a regression."""


class TextBatch(TypedDict):
    """The arguments of :meth:`trainer.classify.model.ClassifierModel.forward`."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64: 1 on tokens, 0 on padding."""
    token_type_ids: NotRequired[Tensor]
    """(B, T) int64, for models that know segments."""
    labels: Tensor
    """(B,) int64 label numbers, or float32 values of a regression."""
    cells: list[Cells | None]
    """Of each unit the edited cells, None for all of them."""


def tokenise_texts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    rule: PositionRule,
    labels: Sequence[str] | None,
    max_length: int,
) -> list[TextRow]:
    """Token ids of every row, by the function that serving uses; no ``labels``: a regression.

    Raises :class:`TrainingError` for a row of more than ``max_length`` tokens, a label that is
    not among ``labels`` or no number, and a text without a position that ``rule`` edits.
    """
    numbers = None if labels is None else {label: float(i) for i, label in enumerate(labels)}
    rows = []
    for example in examples:
        target = _target(example, numbers)
        tokens, segments = encode_pair(tokenizer, *example.texts)
        if len(tokens) > max_length:
            raise TrainingError(
                f"{example.where}: {len(tokens)} tokens, expected at most {max_length}"
            )
        check_edited(example.where, rule, len(tokens))
        rows.append(TextRow(tuple(tokens), tuple(segments), target))
    return rows


def labelled(example: Example) -> str | float:
    """The label of a row. Raises :class:`TrainingError` for a row of another kind."""
    if example.label is None:
        raise TrainingError(f"{example.where}: an encoder learns rows with a text and a label")
    return example.label


def _target(example: Example, numbers: dict[str, float] | None) -> float:
    label = labelled(example)
    if numbers is None:
        if isinstance(label, str):
            raise TrainingError(f"{example.where}: label {label!r}, expected a number")
        return float(label)
    if label not in numbers:
        raise TrainingError(
            f"{example.where}: label {label!r} is none of {', '.join(numbers)}", field="labels"
        )
    return numbers[str(label)]


class TextCollator:
    """Makes batches for one position rule."""

    def __init__(
        self, rule: PositionRule, *, regression: bool, segments: bool, pad_id: int = 0
    ) -> None:
        """``segments``: whether the model embeds them."""
        self._rule = rule
        self._labels_dtype = torch.float32 if regression else torch.int64
        self._segments = segments
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[TextRow]) -> TextBatch:
        """One batch of ``rows``, in order, on the CPU."""
        lengths = [len(row.tokens) for row in rows]
        batch = TextBatch(
            input_ids=padded([row.tokens for row in rows], self._pad_id),
            attention_mask=padded([(1,) * length for length in lengths], 0),
            labels=torch.tensor([row.target for row in rows]).to(self._labels_dtype),
            cells=edited_cells(self._rule, lengths),
        )
        if self._segments:
            batch["token_type_ids"] = padded([row.segments for row in rows], 0)
        return batch


def order_by_length(
    lengths: Sequence[int], batch_size: int, seed: int, window: int = 16
) -> list[int]:
    """Rows in a random order of which each ``batch_size`` are near in length, to pad little.

    Shuffled rows are sorted within windows of ``window`` batches, and the batches are shuffled,
    so that another seed makes other batches.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = [
        batch
        for rows in _parts(order, window * batch_size)
        for batch in _parts(sorted(rows, key=lambda row: lengths[row]), batch_size)
    ]
    # The one that may be short stays last, so that batches cut from the order are these.
    places = torch.randperm(len(batches) - 1, generator=generator).tolist()
    return [row for place in (*places, len(batches) - 1) for row in batches[place]]


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    """``items`` cut into lists of ``size``; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]

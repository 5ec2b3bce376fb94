"""Prompts and their answers to token ids, and those to batches padded on the right.

Dimension letters: B rows, T tokens of the longest prompt, C of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reft_core.errors import TrainingError
from reft_core.positions import PositionRule
from reft_core.spec import TemplateSpec
from reft_core.templates import encode_text, render_text
from trainer.collate import IGNORED
from trainer.data import Example, TokenisedExample
from trainer.interventions import Cells
from trainer.right_padded import check_edited, edited_cells, padded


class Seq2SeqBatch(TypedDict):
    """The arguments of :meth:`trainer.seq2seq.model.Seq2SeqModel.forward`."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64: 1 on tokens, 0 on padding."""
    labels: Tensor
    """(B, C) int64: what the decoder is to answer, :data:`IGNORED` on padding."""
    cells: list[Cells | None]
    """Of each unit the edited cells of the prompts, None for all of them."""


def tokenise_seq2seq(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    rule: PositionRule,
    *,
    template: TemplateSpec,
    max_length: int,
) -> list[TokenisedExample]:
    """Token ids of every row. Both sides get the special tokens that the tokenizer adds.

    Raises :class:`TrainingError` for a prompt or an answer of more than ``max_length`` tokens,
    and for a prompt without a position that ``rule`` edits.
    """
    rows = []
    for example in examples:
        prompt = encode_text(tokenizer, render_text(template, example.messages))
        answer = encode_answer(tokenizer, example.completion)
        for name, tokens in (("prompt", prompt), ("completion", answer)):
            if len(tokens) > max_length:
                raise TrainingError(
                    f"{example.where}: {len(tokens)} tokens in its {name}, expected at most "
                    f"{max_length}"
                )
        check_edited(example.where, rule, len(prompt))
        rows.append(TokenisedExample(tuple(prompt), tuple(answer)))
    return rows


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer, with the special tokens the tokenizer adds by itself."""
    return list(tokenizer(text_target=text)["input_ids"])


class Seq2SeqCollator:
    """Makes batches for one position rule."""

    def __init__(self, rule: PositionRule, pad_id: int) -> None:
        self._rule = rule
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[TokenisedExample]) -> Seq2SeqBatch:
        """One batch of ``rows``, in order, on the CPU."""
        lengths = [len(row.prompt) for row in rows]
        return Seq2SeqBatch(
            input_ids=padded([row.prompt for row in rows], self._pad_id),
            attention_mask=padded([(1,) * length for length in lengths], 0),
            labels=padded([row.completion for row in rows], IGNORED),
            cells=edited_cells(self._rule, lengths),
        )

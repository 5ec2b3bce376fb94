"""Conversations to token ids, by the function that serving uses."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from reft_core.errors import InvalidRequest, TrainingError
from reft_core.positions import PositionRule
from reft_core.spec import TemplateSpec
from reft_core.templates import encode_chat
from trainer.data.examples import Dataset, TokenisedExample


def tokenise(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rule: PositionRule,
    *,
    template: TemplateSpec | None = None,
    max_length: int,
) -> list[TokenisedExample]:
    """Token ids of every row, the prompt's by the function that serving uses.

    Raises :class:`TrainingError` for a row of more than ``max_length`` tokens, a row whose
    prompt has no position that ``rule`` edits, and a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise TrainingError("model: its tokenizer has no end-of-text token, so answers cannot end")
    rows = []
    for example in dataset.examples:
        try:
            prompt = encode_chat(tokenizer, example.messages, template)
        except InvalidRequest as error:
            raise TrainingError(f"{example.where}: {error.message}") from error
        answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        row = TokenisedExample(tuple(prompt), (*answer, tokenizer.eos_token_id))
        length = len(row.prompt) + len(row.completion)
        if length > max_length:
            raise TrainingError(
                f"{example.where}: {length} tokens (prompt {len(row.prompt)}, completion "
                f"{len(row.completion)}), expected at most {max_length}"
            )
        if not any(rule.resolve(len(row.prompt))):
            raise TrainingError(
                f"{example.where}: positions '{rule}' edit nothing in its prompt of "
                f"{len(row.prompt)} tokens"
            )
        rows.append(row)
    return rows

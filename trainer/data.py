"""Training rows: JSONL to conversations, conversations to token ids.

A row is ``{"instruction": …, "completion": …}`` (an optional ``"input"`` follows the
instruction after a blank line) or ``{"messages": […]}`` whose last message, the
assistant's, is the completion. Earlier assistant messages are context and not learnt.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reft_core.errors import InvalidRequest, TrainingError
from reft_core.positions import PositionRule
from reft_core.spec import TemplateSpec
from reft_core.templates import ROLES, encode_chat

log = logging.getLogger(__name__)

Turn = tuple[str, str]
"""Role and text of one message."""


@dataclass(frozen=True)
class Example:
    """One row: what the model is asked, and what it should answer."""

    where: str
    """``file:line``, for messages to people."""
    turns: tuple[Turn, ...]
    completion: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that the completion answers."""
        return [{"role": role, "content": content} for role, content in self.turns]

    @property
    def question(self) -> str:
        """The last message, for people."""
        return self.turns[-1][1]


@dataclass(frozen=True)
class Dataset:
    """The rows of one file."""

    path: Path
    examples: tuple[Example, ...]
    sha256: str
    num_duplicates: int
    """Rows that repeat an earlier one, prompt and completion; kept."""


@dataclass(frozen=True)
class TokenisedExample:
    """One row in token ids. ``completion`` ends with the end-of-text token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def load_dataset(
    path: Path, *, system: str | None = None, labels: Sequence[str] | None = None
) -> Dataset:
    """Read the JSONL file at ``path``; blank lines are skipped.

    ``system`` is put before conversations without a system message. With ``labels``, every
    completion must be one of them. Raises :class:`TrainingError` naming file and line.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: not UTF-8 ({error})") from error
    examples = tuple(
        _parse_row(line, f"{path}:{number}", system)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    )
    if not examples:
        raise TrainingError(f"{path}: holds no rows")
    allowed = {label.strip() for label in labels or ()}
    for example in examples:
        if allowed and example.completion.strip() not in allowed:
            raise TrainingError(
                f"{example.where}: completion {example.completion!r} is none of the labels "
                f"{', '.join(sorted(allowed))}"
            )
    num_duplicates = len(examples) - len({(e.turns, e.completion) for e in examples})
    if num_duplicates:
        log.warning("%s: %d rows repeat an earlier one", path, num_duplicates)
    return Dataset(path, examples, hashlib.sha256(data).hexdigest(), num_duplicates)


def check_no_leak(earlier: Dataset, held_out: Dataset) -> None:
    """Raise :class:`TrainingError` if a prompt of ``held_out`` also occurs in ``earlier``."""
    seen = {example.turns: example.where for example in earlier.examples}
    for example in held_out.examples:
        if example.turns in seen:
            raise TrainingError(
                f"{example.where}: the same prompt is at {seen[example.turns]}; a row that is "
                "evaluated must not be trained on"
            )


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


def _parse_row(line: str, where: str, system: str | None) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise TrainingError(f"{where}: got {type(row).__name__}, expected a JSON object")
    turns = _from_messages(row, where) if "messages" in row else _from_instruction(row, where)
    *asked, (_, completion) = turns
    if not completion.strip():
        raise TrainingError(f"{where}: the completion is empty")
    if system is not None and asked[0][0] != "system":
        asked.insert(0, ("system", system))
    return Example(where, tuple(asked), completion)


def _from_instruction(row: dict[str, Any], where: str) -> list[Turn]:
    """The turns of an instruction row, the completion last."""
    _check_keys(row, where, required=("instruction", "completion"), optional=("input",))
    asked = _text(row, "instruction", where)
    if row.get("input"):
        asked = f"{asked}\n\n{_text(row, 'input', where)}"
    if not asked.strip():
        raise TrainingError(f"{where}: the instruction is empty")
    return [("user", asked), ("assistant", _text(row, "completion", where))]


def _from_messages(row: dict[str, Any], where: str) -> list[Turn]:
    """The turns of a conversation row, the completion last."""
    _check_keys(row, where, required=("messages",))
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
    row: dict[str, Any], where: str, *, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    for key in required:
        if key not in row:
            raise TrainingError(f"{where}: has no {key!r} (its keys: {', '.join(row) or 'none'})")
    for key in row:
        if key not in (*required, *optional):
            raise TrainingError(f"{where}: unknown key {key!r}")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TrainingError(f"{where}: {key} is {type(value).__name__}, expected text")
    return value

"""What ``reft bench`` asks: prompts from a file or its own, models in turn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_core.errors import InvalidRequest

Message = dict[str, str]

_TOPICS = (
    "why bread rises in the oven",
    "how a sailing boat moves against the wind",
    "what a compiler does with a loop",
    "how bees tell each other where flowers are",
    "why the sky is red in the evening",
    "how a lock lets ships climb a hill",
    "what makes a violin sound unlike a flute",
    "how paper is made from wood",
)


@dataclass(frozen=True)
class Shape:
    """What every request of a run has in common."""

    models: tuple[str, ...]
    num_requests: int
    max_tokens: int
    temperature: float
    ignore_eos: bool
    completions: bool
    """Whether ``/completions`` is asked, and not ``/chat/completions``."""

    @property
    def path(self) -> str:
        """The route, below ``/v1``."""
        return "/completions" if self.completions else "/chat/completions"


def own_prompts() -> Iterator[list[Message]]:
    """Prompts of about 30 tokens that differ from the first words on, so that none of them is
    in a server's prefix cache because another was asked.
    """
    number = 0
    while True:
        topic = _TOPICS[number % len(_TOPICS)]
        text = f"Question {number + 1}. Please explain to a curious child {topic}, step by step."
        yield [{"role": "user", "content": text}]
        number += 1


def read_prompts(path: Path) -> list[list[Message]]:
    """The prompts in a file: one a line, or JSON lines with ``prompt``, ``instruction`` or
    ``messages``. Raises :class:`InvalidRequest`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest.because("prompts", str(path), f"a text file ({reason})") from None
    found = [
        _messages(line, f"{path}:{number}") if path.suffix == ".jsonl" else _said(line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise InvalidRequest.because("prompts", str(path), "a file with at least one prompt")
    return found


def bodies(shape: Shape, prompts: Sequence[list[Message]] | None) -> Iterator[dict[str, Any]]:
    """The bodies of the requests, models in turn; each prompt is asked of every model before
    the next, and a file's prompts begin again at its end.
    """
    own = own_prompts()
    said: list[Message] = []
    for number in range(shape.num_requests):
        turn, place = divmod(number, len(shape.models))
        if place == 0:
            said = next(own) if prompts is None else prompts[turn % len(prompts)]
        body: dict[str, Any] = {
            "model": shape.models[place],
            "max_tokens": shape.max_tokens,
            "temperature": shape.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if shape.ignore_eos:
            body["ignore_eos"] = True
        if shape.completions:
            body["prompt"] = "\n".join(message["content"] for message in said)
        else:
            body["messages"] = said
        yield body


def _said(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _messages(line: str, place: str) -> list[Message]:
    """What one JSON line asks."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidRequest.because(f"prompts {place}", line, f"JSON ({error})") from None
    if isinstance(row, str):
        return _said(row)
    if isinstance(row, dict):
        for key in ("prompt", "instruction"):
            if isinstance(row.get(key), str):
                return _said(row[key])
        if isinstance(row.get("messages"), list) and row["messages"]:
            return list(row["messages"])
    expected = "a text, or an object with prompt, instruction or messages"
    raise InvalidRequest.because(f"prompts {place}", row, expected)

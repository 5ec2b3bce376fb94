"""A conversation in a terminal: who answers, how, and what was said. No input, no output."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from reft_core.errors import InvalidRequest
from server.client.answer import Answer

BASE = "base"
"""Stands for the base model wherever a model is named, unless an adapter has this name."""


@dataclass
class Conversation:
    """What is sent with the next message."""

    models: tuple[str, ...]
    """Who answers. Of several, which are asked in one request, the first one's answers are what
    the next message follows on."""
    base: str | None = None
    """The base model; None on a server that does not say."""
    system: str | None = None
    strength: float | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Who gave each answer."""

    @property
    def compares(self) -> bool:
        """Whether several models answer."""
        return len(self.models) > 1

    def body(self, text: str) -> dict[str, Any]:
        """The request that asks ``text``."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        said += [*self.messages, {"role": "user", "content": text}]
        body: dict[str, Any] = {
            "model": self.models[0],
            "messages": said,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for name in ("max_tokens", "temperature", "seed"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        reft: dict[str, Any] = {}
        if self.compares:
            reft["models"] = list(self.models)
        # The base model has no edits to scale, and a server refuses to be told to.
        if self.strength is not None and set(self.models) != {self.base}:
            reft["strength"] = self.strength
        return body | ({"reft": reft} if reft else {})

    def add(self, text: str, answer: Answer) -> None:
        """Keep a message and what was answered, as far as it came."""
        if not answer.texts:
            return
        self.messages.append({"role": "user", "content": text})
        self.messages.append({"role": "assistant", "content": answer.texts[0]})
        self.reports.append(answer.report_of(0))

    def reset(self) -> None:
        """Forget what was said; who answers, and how, stays."""
        self.messages.clear()
        self.reports.clear()

    def document(self) -> str:
        """What was said, as JSON; its ``messages`` can be sent to a server as they are."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return json.dumps(
            {
                "models": list(self.models),
                "strength": self.strength,
                "messages": system + self.messages,
                "answered_by": self.reports,
            },
            indent=1,
            ensure_ascii=False,
        )


def parse_strength(text: str) -> float:
    """A strength as somebody types it. Raises :class:`InvalidRequest`."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise InvalidRequest.because("strength", text, "a number, such as 0.5; 0 is the base model")
    return value

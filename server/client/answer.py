"""A streamed answer as it arrives: texts, who gives them, how fast."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """One answer, or one of each model that was asked."""

    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    stopped: bool = False
    """Whether the reader had enough of it."""
    began_at: float = field(default_factory=time.perf_counter)
    first_at: float | None = None
    """When the first text came; seconds on the clock of ``began_at``."""
    last_at: float | None = None
    num_chunks: int = 0
    """Chunks that had text."""
    _whole: dict[str, Any] = field(default_factory=dict)
    _reports: dict[int, dict[str, Any]] = field(default_factory=dict)

    def take(self, chunk: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Add a chunk; the new text in it, by choice."""
        if chunk.get("usage"):
            self.usage = dict(chunk["usage"])
        if isinstance(chunk.get("reft"), dict):
            self._whole = chunk["reft"]
        news = []
        for choice in chunk.get("choices", ()):
            index = choice.get("index", 0)
            while len(self.texts) <= index:
                self.texts.append("")
                self.finish_reasons.append(None)
            if isinstance(choice.get("reft"), dict):
                self._reports[index] = choice["reft"]
            if choice.get("finish_reason"):
                self.finish_reasons[index] = choice["finish_reason"]
            delta = choice.get("delta") or {}
            if text := delta.get("content") or delta.get("reasoning_content"):
                self.texts[index] += text
                news.append((index, text))
        if news:
            self.last_at = time.perf_counter()
            self.first_at = self.last_at if self.first_at is None else self.first_at
            self.num_chunks += 1
        return news

    def report_of(self, index: int) -> dict[str, Any]:
        """What the server says of the adapter that gave a choice; empty on other servers."""
        return self._reports.get(index, self._whole)

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices: as the server counts them, else a chunk for a token."""
        return self.num_chunks if self.usage is None else int(self.usage["completion_tokens"])

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first text."""
        return None if self.first_at is None else self.first_at - self.began_at

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first, over the time they took; None if there is only one."""
        if self.first_at is None or self.last_at is None or self.num_tokens < 2:
            return None
        took = self.last_at - self.first_at
        return (self.num_tokens - 1) / took if took > 0 else None

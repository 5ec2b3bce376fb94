"""One choice of a generation while the engine makes it: its outputs in, deltas out."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Literal

from reft_core.engine.interface import Engine, Output
from reft_core.errors import EngineUnavailable, ReftError, RequestFailed
from server.answering.choice import ChoiceText, Piece
from server.observability.metrics import Metrics
from server.observability.record import ChoiceRecord

AnswerEnd = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """The next piece of one choice; the last of a choice has ``finish_reason``."""

    index: int
    piece: Piece
    finish_reason: AnswerEnd | None = None


class RunningChoice:
    """One sub-request in the engine. Belongs to the event loop."""

    def __init__(
        self, index: int, text: ChoiceText, engine: Engine, metrics: Metrics, arrived_at: float
    ) -> None:
        self.index = index
        self.request_id = uuid.uuid4().hex
        self.num_edits = 0
        self.num_cached_tokens = 0
        self.num_prompt_tokens = 0
        self.max_tokens = 0
        self.record = ChoiceRecord()
        self.ended = False
        """No more of its outputs are wanted."""
        self._text = text
        self._engine = engine
        self._metrics = metrics
        self._arrived_at = arrived_at
        self._last_token_at: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return self._text.num_tokens

    def observe(self, output: Output) -> None:
        """Note when an output came."""
        now = time.perf_counter()
        if output.token is not None:
            if self._last_token_at is None:
                self._metrics.observe_first_token(now - self._arrived_at)
                self.record.first_token_at = now
            else:
                self._metrics.observe_gap(now - self._last_token_at)
            self._last_token_at = self.record.last_token_at = now
        if output.timings is not None:
            self._metrics.observe_stages(output.timings)
            self.record.timings, self.record.ended_at = output.timings, now

    def advance(self, output: Output) -> Delta | None:
        """The delta an output makes, if there is anything to show. Raises what ended it early."""
        if self.ended:
            return None
        self.num_cached_tokens = output.num_cached_tokens
        reason = output.finish_reason
        has_answer = output.token is not None or reason == "length"
        if not has_answer or reason in ("error", "cancelled"):
            self._end("error")
            raise _failure(output)
        is_last = reason is not None
        piece = Piece()
        if output.token is not None:
            hidden = reason == "stop" and not output.completes_constraint
            piece = self._text.push(output.token, is_last=is_last, hidden=hidden)
        end: AnswerEnd | None = None
        if self._text.stopped or reason == "stop":
            end = "stop"
        elif reason == "length":
            end = "length"
        if end is not None:
            self._end(end)
            if not is_last:
                self._engine.cancel(self.request_id)
        if end is None and not piece.text and not piece.tokens:
            return None
        return Delta(self.index, piece, end)

    def drop(self, reason: Literal["abort", "error"]) -> None:
        """Cancel it for ``reason``, unless it has ended."""
        if not self.ended:
            self._end(reason)
            self._engine.cancel(self.request_id)

    def _end(self, reason: str) -> None:
        """Take no more outputs."""
        self.ended = True
        self.record.num_tokens, self.record.finish_reason = self.num_tokens, reason
        self._metrics.observe_end(reason, time.perf_counter() - self._arrived_at)
        self._metrics.observe_counts(self.num_prompt_tokens, self.num_tokens, self.max_tokens)
        if (pace := self.record.time_per_token_s) is not None:
            self._metrics.observe_pace(pace)


def _failure(output: Output) -> ReftError:
    """What ended a choice that has no answer."""
    if output.error is not None:
        return output.error
    if output.finish_reason == "cancelled":
        return EngineUnavailable("the engine cancelled the request")
    return RequestFailed("the engine ended the request without saying why")

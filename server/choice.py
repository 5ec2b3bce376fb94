"""One choice of a response as it grows: tokens in, displayable pieces of text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reft_core.engine.interface import Token
from server.text import Detokenizer, StopMatcher
from server.vocabulary import Vocabulary

_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class LikelyToken:
    """A token's text, bytes and log-probability, for people."""

    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True)
class TokenText(LikelyToken):
    """A generated token, with the likeliest ones in its place."""

    top: tuple[LikelyToken, ...] = ()
    text_offset: int = 0
    """Characters of the choice's text before it."""


@dataclass(frozen=True)
class Piece:
    """Text to show next, and the tokens that begin in it (if log-probabilities are wanted)."""

    text: str = ""
    tokens: tuple[TokenText, ...] = ()


@dataclass
class ChoiceText:
    """Assembles a choice's text: detokenises, cuts at a stop string, keeps tokens in step."""

    vocabulary: Vocabulary
    stops: Sequence[str] = ()
    with_tokens: bool = False
    num_tokens: int = field(default=0, init=False)
    """Tokens generated so far, a stop token included."""

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.vocabulary.decode, self.vocabulary.special_ids)
        self._matcher = StopMatcher(self.stops)
        self._num_decoded = 0
        self._num_shown = 0
        self._pending: list[TokenText] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._matcher.matched is not None

    def push(self, token: Token, *, is_last: bool = False, hidden: bool = False) -> Piece:
        """What becomes visible with ``token``.

        ``is_last`` flushes everything held back. A ``hidden`` token, one that ends the
        answer, is counted but has no text.
        """
        self.num_tokens += 1
        text = ""
        if not hidden:
            if self.with_tokens:
                self._pending.append(self._token_text(token))
            text = self._see(self._detokenizer.push(token.token_id))
        if is_last and not self.stopped:
            text += self._see(self._detokenizer.finish())
            text += self._matcher.finish()
        self._num_shown += len(text)
        return Piece(text, self._release(everything=is_last and not self.stopped))

    def _see(self, decoded: str) -> str:
        """The part of newly decoded text that may be shown."""
        self._num_decoded += len(decoded)
        return self._matcher.push(decoded)

    def _release(self, *, everything: bool) -> tuple[TokenText, ...]:
        """Pending tokens whose text has begun to show."""
        shown = [t for t in self._pending if everything or t.text_offset < self._num_shown]
        self._pending = self._pending[len(shown) :]
        return tuple(shown)

    def _token_text(self, token: Token) -> TokenText:
        """``token`` as people read it."""
        text, data = self.vocabulary.describe(token.token_id)
        top = tuple(
            LikelyToken(*self.vocabulary.describe(other.token_id), _finite(other.logprob))
            for other in token.top_logprobs
        )
        assert token.logprob is not None, "log-probabilities were asked for"
        return TokenText(text, data, _finite(token.logprob), top, self._num_decoded)


def _finite(logprob: float) -> float:
    """``logprob``, with OpenAI's stand-in for minus infinity, which JSON cannot hold."""
    return max(logprob, _LEAST_LOGPROB)

"""One choice of a response as it grows: tokens in, displayable pieces of text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reft_core.engine.interface import Token
from reft_core.vocabulary import Vocabulary
from server.answering.text import Detokenizer, StopMatcher

_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class LikelyToken:
    """A token's text, bytes and log-probability, for people."""

    token_id: int
    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True)
class TokenText(LikelyToken):
    """A token of an answer or a prompt, with the likeliest ones in its place."""

    top: tuple[LikelyToken, ...] = ()
    text_offset: int = 0
    """Characters of the answer's, or the prompt's, text before it."""
    rank: int | None = None
    """Of a prompt's token, its place among all tokens, from 1."""


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
    with_stop_token: bool = False
    """Whether a token that ends the answer is among the tokens, though not in the text."""
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
        if hidden and self.with_tokens and self.with_stop_token:
            self._pending.append(self._token_text(token))
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
        return describe_token(self.vocabulary, token, self._num_decoded)


def describe_token(vocabulary: Vocabulary, token: Token, text_offset: int) -> TokenText:
    """A token, whose log-probability must be known, as people read it."""
    text, data = vocabulary.describe(token.token_id)
    top = tuple(
        LikelyToken(other.token_id, *vocabulary.describe(other.token_id), _finite(other.logprob))
        for other in token.top_logprobs
    )
    assert token.logprob is not None, "log-probabilities were asked for"
    logprob = _finite(token.logprob)
    return TokenText(token.token_id, text, data, logprob, top, text_offset, token.rank)


def _finite(logprob: float) -> float:
    """``logprob``, with OpenAI's stand-in for minus infinity, which JSON cannot hold."""
    return max(logprob, _LEAST_LOGPROB)

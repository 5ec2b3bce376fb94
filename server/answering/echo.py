"""Prompts as answers show them: the text, where in it each token begins, and how likely it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from reft_core.engine.interface import Token
from reft_core.vocabulary import Vocabulary
from server.answering.choice import TokenText, describe_token
from server.answering.text import Detokenizer


@dataclass(frozen=True)
class Echo:
    """A prompt's text."""

    text: str
    offsets: tuple[int, ...] = ()
    """Characters of the text before each token, if they were asked for."""


@dataclass(frozen=True)
class ScoredPrompt:
    """The tokens of a prompt with their log-probabilities."""

    first: str
    """The first token, which nothing makes likely or unlikely."""
    tokens: list[TokenText]
    """All the others."""

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, first: int, others: Sequence[Token], offsets: Sequence[int]
    ) -> ScoredPrompt:
        """From what the engine says; ``offsets`` of all tokens, or none."""
        starts = offsets[1:] or [0] * len(others)
        return cls(
            vocabulary.describe(first)[0],
            [
                describe_token(vocabulary, token, start)
                for token, start in zip(others, starts, strict=True)
            ],
        )


def echo_of(vocabulary: Vocabulary, token_ids: Sequence[int], text: str | None) -> Echo:
    """The echo of a prompt with its offsets; ``text`` is what the client sent, if it was text.

    Tokens that the tokenizer added around the text, or that have none, take no room. Where the
    tokenizer changed the text, the echo is the text as the model read it.
    """
    if text is None:
        return _decoded(vocabulary, token_ids, special=False)
    whole = _decoded(vocabulary, token_ids, special=True)
    start = whole.text.find(text)
    if start < 0:
        return _decoded(vocabulary, token_ids, special=False)
    return Echo(text, tuple(min(max(at - start, 0), len(text)) for at in whole.offsets))


def _decoded(vocabulary: Vocabulary, token_ids: Sequence[int], *, special: bool) -> Echo:
    """The text of some tokens, special ones with theirs or without."""
    skip = frozenset() if special else vocabulary.special_ids
    detokenizer = Detokenizer(partial(vocabulary.decode, special=special), skip)
    pieces: list[str] = []
    offsets: list[int] = []
    length = 0
    for token in token_ids:
        offsets.append(length)
        pieces.append(detokenizer.push(token))
        length += len(pieces[-1])
    return Echo("".join((*pieces, detokenizer.finish())), tuple(offsets))

"""Token ids to text, one token at a time, and the search for stop strings in it.

Pure: knows nothing of requests. Concatenated, the pieces of a :class:`Detokenizer` are the
text of all its tokens, and the pieces of a :class:`StopMatcher` are its input up to the
first stop string, however the input was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of a run of token ids, special tokens left out."""

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 32
"""No character spans this many tokens, so a longer undecodable run is plain garbage."""
_SETTLED_TOKENS = 4
"""A UTF-8 decoder has forgotten where it started after at most four bytes."""


class Detokenizer:
    """Turns tokens into text without ever ending a piece inside a character.

    A token's text can depend on its left neighbours (a word's leading space, the bytes of
    one character), so new tokens are decoded together with those of the last piece, and
    only what they add is new.
    """

    def __init__(self, decode: Decode, skip: frozenset[int] = frozenset()) -> None:
        self._decode = decode
        self._skip = skip  # tokens without text, such as <|im_end|>
        self._context: list[int] = []  # tokens of the last piece that had text
        self._context_text = ""
        self._held: list[int] = []  # tokens whose text has not been given out

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` completes; empty while a character is incomplete."""
        if token_id in self._skip:
            return ""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if not text.endswith(_REPLACEMENT):
            return self._give_out(text, len(self._held))
        if len(self._held) > _MAX_HELD_TOKENS:
            return self._give_up_on_oldest()
        return ""

    def finish(self) -> str:
        """Text still held back, incomplete characters as U+FFFD. Ends the text."""
        if not self._held:
            return ""
        return self._give_out(self._decode(self._context + self._held), len(self._held))

    def _give_out(self, text: str, num_tokens: int) -> str:
        """What ``text``, of the context and ``num_tokens`` held tokens, adds to the context."""
        given, self._held = self._held[:num_tokens], self._held[num_tokens:]
        if text.startswith(self._context_text):
            new = text[len(self._context_text) :]
        else:  # some decoders re-read earlier bytes once a later one is invalid
            new = self._decode(given)
        if new:
            self._context, self._context_text = given, self._decode(given)
        else:  # no text yet, but perhaps a say in what comes next
            self._context += given
        return new

    def _give_up_on_oldest(self) -> str:
        """Give out most of a long undecodable run, cut where no character is cut."""
        whole = self._decode(self._context + self._held)
        most = len(self._held) - _SETTLED_TOKENS
        cut = most
        for candidate in range(most, most - _SETTLED_TOKENS, -1):
            head = self._decode(self._context + self._held[:candidate])
            if head + self._decode(self._held[candidate:]) == whole:
                cut = candidate
                break
        return self._give_out(self._decode(self._context + self._held[:cut]), cut)


class StopMatcher:
    """Passes text through until a stop string is complete, then nothing more.

    Text that may be the beginning of a stop string waits until it is known not to be. Of
    several stop strings the one that is complete first counts; of those complete at the
    same character, the one that began first.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        assert all(self._stops), "a stop string is not empty"
        self._beginnings = frozenset(stop[:n] for stop in self._stops for n in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._waiting = ""
        self.matched: str | None = None
        """The stop string found; once set, :meth:`push` and :meth:`finish` return nothing."""

    def push(self, text: str) -> str:
        """The part of the text so far that is now known to precede any stop string."""
        if self.matched is not None:
            return ""
        text = self._waiting + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._waiting = ""
            return text[:at]
        keep = next(
            (
                length
                for length in range(min(self._longest, len(text)), 0, -1)
                if text[-length:] in self._beginnings
            ),
            0,
        )
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Text that waited for a stop string that never came. Ends the text."""
        waiting, self._waiting = self._waiting, ""
        return waiting

"""Single tokens: their text, their bytes, which are special."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MARK = "\u2581"  # SentencePiece writes a word's leading space as this
_REPLACEMENT = "\ufffd"


def _byte_level_alphabet() -> dict[str, int]:
    """Byte that each character of a byte-level BPE vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class Vocabulary:
    """Reads a tokenizer's tokens. Safe to use from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Tokens that are no part of any text."""
        self.describe = lru_cache(maxsize=65536)(self._describe)
        """Text and bytes of one token by itself; text names the bytes if they are no text."""
        # Without the conversions around it, which take longer than it does.
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_one = lru_cache(maxsize=65536)(self._decode)

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of a run of tokens, with or without that of special ones."""
        decode = self._decode_one if len(token_ids) == 1 else self._decode
        return decode(*token_ids, special=special)

    def _decode(self, *token_ids: int, special: bool) -> str:
        """See :meth:`decode`."""
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=not special)
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def _describe(self, token_id: int) -> tuple[str, bytes]:
        """See :attr:`describe`."""
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(raw, str):  # an id the model has and the tokenizer lacks
            return text, text.encode()
        if match := _BYTE_TOKEN.fullmatch(raw):
            data = bytes([int(match[1], 16)])
        elif _REPLACEMENT in text and all(character in _ALPHABET for character in raw):
            data = bytes(_ALPHABET[character] for character in raw)
        elif raw.startswith(_WORD_MARK) and not text.startswith(" "):
            data = f" {text}".encode()
        else:
            data = text.encode()
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

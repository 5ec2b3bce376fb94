"""Chunks of a stream that differ in nothing but their text."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from json.encoder import encode_basestring

from pydantic import BaseModel


def as_document(chunk: BaseModel) -> str:
    """The JSON that a client gets of a chunk."""
    return chunk.model_dump_json(exclude_unset=True)


class TextChunks:
    """Writes such chunks around their text, without building or validating each anew.

    The model of the chunk stays the only place that knows its form: what is around the text is
    cut from one that was built.
    """

    def __init__(self, build: Callable[[int, str], BaseModel]) -> None:
        self._build = build
        self._around: dict[int, tuple[str, str]] = {}

    def document(self, index: int, text: str) -> str:
        """``as_document(build(index, text))`` for any text that UTF-8 can hold."""
        if index not in self._around:
            mark = uuid.uuid4().hex  # nothing that a caller has sent contains it
            before, after = as_document(self._build(index, mark)).split(f'"{mark}"')
            self._around[index] = before, after
        before, after = self._around[index]
        return f"{before}{encode_basestring(text)}{after}"

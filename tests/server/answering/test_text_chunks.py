"""Chunks written around their text are, byte for byte, those that a model of them makes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.answering.text_chunks import TextChunks, as_document
from server.protocol.chat import ChatChunk, ChunkChoice, MessageDelta
from server.protocol.completions import CompletionChoice, CompletionResponse
from tests.server.fakes import MODEL

HEAD: dict[str, Any] = {"id": "x-1", "created": 7, "model": 'a "name" \\ with\n all of it'}
HEAD["system_fingerprint"] = "reft-1"


def completion(index: int, text: str) -> CompletionResponse:
    choice = CompletionChoice(index=index, text=text, logprobs=None, finish_reason=None)
    return CompletionResponse(**HEAD, usage=None, choices=[choice])


def chat(index: int, text: str) -> ChatChunk:
    delta = MessageDelta(content=text)
    return ChatChunk(**HEAD, choices=[ChunkChoice(index=index, delta=delta, finish_reason=None)])


UTF8 = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=UTF8, index=st.integers(0, 3))
def test_any_text(text: str, index: int) -> None:
    for build in (completion, chat):
        texts = TextChunks(build)
        for _ in range(2):
            assert texts.document(index, text) == as_document(build(index, text))


def test_every_character_of_the_first_planes() -> None:
    texts = TextChunks(completion)
    for start in range(0, 0x3000, 64):
        text = "".join(map(chr, range(start, start + 64)))
        assert texts.document(0, text) == as_document(completion(0, text))


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_has_the_same_bytes(server, engine, monkeypatch, path, options) -> None:
    """As if every chunk had been built."""
    engine.reply = lambda _: 'a "quoted" \\ line\nand é, 漢, 🙂 \x01\x7f end'
    body: dict[str, Any] = {"model": MODEL.name, "max_tokens": 60, "stream": True, **options}
    body |= (
        {"prompt": "hi"}
        if path.endswith("v1/completions")
        else {"messages": [{"role": "user", "content": "hi"}]}
    )

    def events() -> list[Any]:
        answer = server.http.post(path, json=body)
        assert answer.status_code == 200
        parts = [part.removeprefix("data: ") for part in answer.text.split("\n\n")[:-1]]
        assert parts.pop() == "[DONE]"
        first = json.loads(parts[0])
        names = {first["id"]: "ID", f'"created":{first["created"]}': '"created":0'}
        for found, name in names.items():
            parts = [part.replace(found, name) for part in parts]
        return sorted(parts)  # choices take turns as they like

    written = events()
    assert len(written) > 10
    monkeypatch.setattr(
        TextChunks, "document", lambda self, index, text: as_document(self._build(index, text))
    )
    assert events() == written

"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import Request, Response
from transformers import PreTrainedTokenizerBase

from reft_core.spec import TemplateSpec
from reft_core.templates import encode_chat
from server.answering.choice import TokenText
from server.answering.generation import FinishedChoice, Generation
from server.answering.job import Job
from server.answering.running import Delta
from server.answering.text_chunks import TextChunks
from server.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    ChunkChoice,
    MessageDelta,
    ScoredChatResponse,
)
from server.protocol.prompt_logprobs import prompt_logprobs_of
from server.protocol.reports import Usage, choice_report_of, report_of
from server.routes.answering import ANSWERED, answer_stream, answer_whole, new_id, now
from server.routes.guards import ApiRoute, make_router
from server.services import services_of

router = make_router(ApiRoute, tag="inference")


@router.post(
    "/v1/chat/completions", response_model=ScoredChatResponse | ChatResponse, responses=ANSWERED
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, with the adapter that ``model`` names and its template, or with
    several.
    """
    body.check(services_of(request).settings)
    job = _job(body)
    head: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "created": now(),
        "model": body.model,
        "system_fingerprint": services_of(request).fingerprint,
    }
    if body.stream:
        return await answer_stream(request, job, partial(_chunks, body, head))
    return await answer_whole(request, job, partial(_whole, body, head))


def _job(body: ChatRequest) -> Job:
    """What the request asks for. Raises :class:`InvalidRequest`."""

    def encode(
        tokenizer: PreTrainedTokenizerBase, template: TemplateSpec | None
    ) -> list[list[int]]:
        return [encode_chat(tokenizer, body.conversation, template)]

    limit = body.token_limit
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Job(
        answering=body.answering,
        encode=encode,
        params=body.sampling(1 if limit is None else limit, num_logprobs, body.prompt_logprobs),
        fill_context=limit is None,
        n=body.num_choices,
        stops=tuple(body.stop),
        priority=body.priority,
        grammar=body.grammar,
    )


def _whole(
    body: ChatRequest, head: dict[str, Any], generation: Generation, choices: list[FinishedChoice]
) -> ChatResponse:
    """The whole answer."""
    answer = ChatResponse(
        **head,
        choices=[
            ChatChoice(
                index=index,
                message=AnswerMessage(content=choice.text),
                logprobs=_logprobs(body, choice.tokens),
                finish_reason=choice.finish_reason,
                reft=choice_report_of(generation, index),
            )
            for index, choice in enumerate(choices)
        ],
        usage=Usage.of(generation),
        reft=report_of(generation),
    )
    if body.prompt_logprobs is None:
        return answer
    scores = prompt_logprobs_of(generation.scored[0].tokens, body.prompt_logprobs)
    return ScoredChatResponse(**dict(answer), prompt_logprobs=scores)


async def _chunks(
    body: ChatRequest, head: dict[str, Any], generation: Generation, deltas: AsyncIterator[Delta]
) -> AsyncIterator[ChatChunk | str]:
    """The answer as a stream.

    Each choice opens with its role and says who gives it; then come its pieces.
    """
    # Left out, not null, unless the caller wants a usage chunk: as in OpenAI's API.
    shared: dict[str, Any] = {**head, "object": "chat.completion.chunk"}
    if body.include_usage:
        shared["usage"] = None
    first: dict[str, Any] = {"reft": report_of(generation)}
    opening = MessageDelta(role="assistant", content="")
    for index in range(generation.num_choices):
        choice = _chunk_choice(index, opening, reft=choice_report_of(generation, index))
        yield ChatChunk(**shared, **first, choices=[choice])
        first = {}

    def plain(index: int, text: str) -> ChatChunk:
        choice = _chunk_choice(index, MessageDelta(content=text))
        return ChatChunk(**shared, choices=[choice])

    texts = TextChunks(plain)
    async for delta in deltas:
        text = delta.piece.text
        if text and not body.logprobs and delta.finish_reason is None:
            yield texts.document(delta.index, text)
            continue
        message = MessageDelta(content=text) if text else MessageDelta()
        choice = _chunk_choice(
            delta.index,
            message,
            logprobs=_logprobs(body, delta.piece.tokens),
            finish_reason=delta.finish_reason,
        )
        yield ChatChunk(**shared, choices=[choice])
    if body.include_usage:
        yield ChatChunk(**{**shared, "usage": Usage.of(generation)}, choices=[])


def _chunk_choice(index: int, delta: MessageDelta, **rest: Any) -> ChunkChoice:
    """A chunk's choice with every field spelt out, also those that are null."""
    return ChunkChoice(
        **{"logprobs": None, "finish_reason": None, **rest}, index=index, delta=delta
    )


def _logprobs(body: ChatRequest, tokens: Sequence[TokenText]) -> ChatLogprobs | None:
    """The log-probabilities of some tokens, if they are wanted."""
    return ChatLogprobs.of(tokens) if body.logprobs else None

"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from transformers import PreTrainedTokenizerBase

from reft_core.spec import TemplateSpec
from reft_core.templates import encode_text
from server.generation import Delta, FinishedChoice, Generation, Job
from server.protocol.common import ReftReport, Usage
from server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from server.routes.answering import answer_stream, answer_whole, new_id, now
from server.routes.guards import ApiRoute, make_router
from server.services import services_of

router = make_router(ApiRoute, tag="inference")


@router.post("/v1/completions", response_model=CompletionResponse)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or many prompts, with the adapter that ``model`` names."""
    services = services_of(request)
    body.check(services.settings)

    def encode(
        tokenizer: PreTrainedTokenizerBase, _template: TemplateSpec | None
    ) -> list[list[int]]:
        return [
            encode_text(tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]

    job = Job(
        named=body.named,
        encode=encode,
        params=body.sampling(16 if body.max_tokens is None else body.max_tokens, body.logprobs),
        n=body.num_choices,
        stops=tuple(body.stop),
        priority=body.priority,
    )
    head: dict[str, Any] = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model,
    }
    echoes = _echoes(body, services.generator.decode)

    def whole(generation: Generation, choices: list[FinishedChoice]) -> CompletionResponse:
        return CompletionResponse(
            **head,
            choices=[
                CompletionChoice(
                    index=index,
                    text=(echoes[index // generation.n] if echoes else "") + choice.text,
                    logprobs=_logprobs(body, choice.tokens),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=Usage.of(generation),
            reft=ReftReport.of(generation),
        )

    async def chunks(
        generation: Generation, deltas: AsyncIterator[Delta]
    ) -> AsyncIterator[CompletionResponse]:
        # Left out, not null, unless the caller wants a usage chunk: as in OpenAI's API.
        shared: dict[str, Any] = {**head, "usage": None} if body.include_usage else head
        first: dict[str, Any] = {"reft": ReftReport.of(generation)}
        begun: set[int] = set()
        async for delta in deltas:
            text = delta.piece.text
            if echoes and delta.index not in begun:
                text = echoes[delta.index // generation.n] + text
            begun.add(delta.index)
            choice = CompletionChoice(
                index=delta.index,
                text=text,
                logprobs=_logprobs(body, list(delta.piece.tokens)),
                finish_reason=delta.finish_reason,
            )
            yield CompletionResponse(**shared, **first, choices=[choice])
            first = {}
        if body.include_usage:
            yield CompletionResponse(**{**head, "usage": Usage.of(generation)}, choices=[])

    if body.stream:
        return await answer_stream(request, job, chunks)
    return await answer_whole(request, job, whole)


def _echoes(body: CompletionRequest, decode: Any) -> list[str]:
    """The prompts' texts, if the answers are to begin with them."""
    if not body.echo:
        return []
    return [prompt if isinstance(prompt, str) else decode(prompt) for prompt in body.prompts]


def _logprobs(body: CompletionRequest, tokens: list[Any]) -> CompletionLogprobs | None:
    """The log-probabilities of some tokens, if they are wanted."""
    return None if body.logprobs is None else CompletionLogprobs.of(tokens)

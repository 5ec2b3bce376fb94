"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import cache, partial
from typing import Any

from fastapi import Request, Response
from transformers import PreTrainedTokenizerBase

from reft_core.spec import TemplateSpec
from reft_core.templates import encode_text
from server.answering.choice import TokenText
from server.answering.generation import FinishedChoice, Generation
from server.answering.job import Job
from server.answering.running import Delta
from server.answering.text_chunks import TextChunks
from server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    ScoredCompletionChoice,
)
from server.protocol.prompt_logprobs import prompt_logprobs_of
from server.protocol.reports import Usage, choice_report_of, report_of
from server.routes.answering import ANSWERED, answer_stream, answer_whole, new_id, now
from server.routes.guards import ApiRoute, make_router
from server.services import services_of

router = make_router(ApiRoute, tag="inference")

_DEFAULT_TOKENS = 16


@router.post("/v1/completions", response_model=CompletionResponse, responses=ANSWERED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or many prompts, with the adapter that ``model`` names, or with several."""
    settings = services_of(request).settings
    body.check(settings)
    job = _job(body, settings.max_answer_tokens)
    head: dict[str, Any] = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model,
        "system_fingerprint": services_of(request).fingerprint,
    }
    if body.stream:
        return await answer_stream(request, job, partial(_chunks, body, head))
    return await answer_whole(request, job, partial(_whole, body, head))


def _job(body: CompletionRequest, most: int | None) -> Job:
    """What the request asks for. Raises :class:`InvalidRequest`."""

    @cache  # whatever the template, so that of many models not each tokenises anew
    def tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return [
            encode_text(tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]

    def encode(
        tokenizer: PreTrainedTokenizerBase, _template: TemplateSpec | None
    ) -> list[list[int]]:
        return tokens(tokenizer)

    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = min(_DEFAULT_TOKENS, most or _DEFAULT_TOKENS)
    return Job(
        answering=body.answering,
        encode=encode,
        params=body.sampling(max_tokens, body.logprobs, body.scored_prompt),
        n=body.num_choices,
        stops=tuple(body.stop),
        priority=body.priority,
        grammar=body.grammar,
        echoed=_texts(body) if body.echo else (),
        with_stop_token=True,
    )


def _whole(
    body: CompletionRequest,
    head: dict[str, Any],
    generation: Generation,
    choices: list[FinishedChoice],
) -> CompletionResponse:
    """The whole answer."""
    return CompletionResponse(
        **head,
        choices=[
            _with_scores(
                body,
                generation,
                CompletionChoice(
                    index=index,
                    text=_echo(generation, index) + choice.text,
                    logprobs=_logprobs(body, generation, index, choice.tokens, begins=True),
                    finish_reason=choice.finish_reason,
                    reft=choice_report_of(generation, index),
                ),
            )
            for index, choice in enumerate(choices)
        ],
        usage=Usage.of(generation),
        reft=report_of(generation),
    )


async def _chunks(
    body: CompletionRequest,
    head: dict[str, Any],
    generation: Generation,
    deltas: AsyncIterator[Delta],
) -> AsyncIterator[CompletionResponse | str]:
    """The answer as a stream. The first piece of a choice says who gives it, and has its echo."""
    # Left out, not null, unless the caller wants a usage chunk: as in OpenAI's API.
    shared: dict[str, Any] = {**head, "usage": None} if body.include_usage else head
    first: dict[str, Any] = {"reft": report_of(generation)}
    begun: set[int] = set()

    def plain(index: int, text: str) -> CompletionResponse:
        choice = CompletionChoice(
            index=index, text=text, logprobs=None, finish_reason=None, reft=None
        )
        return CompletionResponse(**shared, choices=[choice])

    texts = TextChunks(plain)
    async for delta in deltas:
        index, piece = delta.index, delta.piece
        begins = index not in begun
        if not begins and body.logprobs is None and delta.finish_reason is None:
            yield texts.document(index, piece.text)
            continue
        begun.add(index)
        choice = CompletionChoice(
            index=index,
            text=(_echo(generation, index) if begins else "") + piece.text,
            logprobs=_logprobs(body, generation, index, list(piece.tokens), begins=begins),
            finish_reason=delta.finish_reason,
            reft=choice_report_of(generation, index) if begins else None,
        )
        yield CompletionResponse(**shared, **first, choices=[choice])
        first = {}
    if body.include_usage:
        yield CompletionResponse(**{**head, "usage": Usage.of(generation)}, choices=[])


def _texts(body: CompletionRequest) -> tuple[str | None, ...]:
    """The prompts' texts, None for tokens."""
    return tuple(prompt if isinstance(prompt, str) else None for prompt in body.prompts)


def _echo(generation: Generation, index: int) -> str:
    """The text that a choice begins with."""
    return generation.echoes[index // generation.n].text if generation.echoes else ""


def _logprobs(
    body: CompletionRequest,
    generation: Generation,
    index: int,
    tokens: list[TokenText],
    *,
    begins: bool,
) -> CompletionLogprobs | None:
    """The log-probabilities of some tokens of a choice, if they are wanted, and of the prompt
    that it begins with.
    """
    if body.logprobs is None:
        return None
    is_echoed = begins and bool(generation.echoes)
    return CompletionLogprobs.of(
        tokens,
        body.logprobs,
        shift=len(_echo(generation, index)),
        echo=generation.scored[index // generation.n] if is_echoed else None,
    )


def _with_scores(
    body: CompletionRequest, generation: Generation, choice: CompletionChoice
) -> CompletionChoice:
    """A choice with the prompt's log-probabilities in vLLM's form, if they are wanted."""
    if body.prompt_logprobs is None:
        return choice
    tokens = generation.scored[choice.index // generation.n].tokens
    scores = prompt_logprobs_of(tokens, body.prompt_logprobs)
    return ScoredCompletionChoice(**dict(choice), prompt_logprobs=scores)

"""What both text APIs do with a job: run it whole, or open a stream once it has begun."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from server.answering.generation import FinishedChoice, Generation
from server.answering.job import Job
from server.answering.named import UsedAdapter
from server.answering.running import Delta
from server.http.disconnect import unless_gone
from server.http.sse import EventStream, frames
from server.observability.record import current_record
from server.routes.guards import caller_of
from server.services import services_of

Chunks = AsyncIterator[BaseModel | str]
"""The chunks of a stream, or their JSON."""

ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer",
        "headers": {
            "x-reft-adapter": {
                "description": "digests of the adapters that answered, or `base`; absent where "
                "several models did",
                "schema": {"type": "string"},
            },
            "x-reft-models": {
                "description": "how many models answered, where several did",
                "schema": {"type": "integer", "minimum": 1},
            },
            "x-reft-edits": {
                "description": "edits that were applied",
                "required": True,
                "schema": {"type": "integer", "minimum": 0},
            },
        },
    }
}
"""What an answer says in its headers, for the documentation of routes."""


async def answer_whole(
    request: Request,
    job: Job,
    build: Callable[[Generation, list[FinishedChoice]], BaseModel],
) -> Response:
    """The whole response, made by ``build``. Cancelled if the client goes away."""
    generator = services_of(request).generator
    job = replace(job, caller=caller_of(request))

    async def work() -> Response:
        generation = await generator.start(job)
        try:
            choices = await generation.collect()
            body = build(generation, choices).model_dump_json()
            return Response(body, media_type="application/json", headers=_headers(generation))
        finally:
            generation.close()

    return await unless_gone(request.receive, work())


async def answer_stream(
    request: Request,
    job: Job,
    build: Callable[[Generation, AsyncIterator[Delta]], Chunks],
) -> Response:
    """A stream of the chunks that ``build`` makes of the deltas.

    Waits for the first delta before it answers, so that a request that fails at once, also
    in its prefill, gets a status and not an event.
    """
    generator = services_of(request).generator
    job = replace(job, caller=caller_of(request))
    current_record().is_stream = True

    async def begin() -> tuple[Generation, AsyncIterator[Delta]]:
        generation = await generator.start(job)
        try:
            deltas = aiter(generation)
            first = await anext(deltas)
        except BaseException:
            generation.close()
            raise
        return generation, _chain(first, deltas)

    generation, deltas = await unless_gone(request.receive, begin())
    return EventStream(
        frames(build(generation, deltas)),
        generation.close,
        _headers(generation),
    )


def _headers(generation: Generation) -> dict[str, str]:
    """Headers that say who answered; of several models, only how many there were."""
    if not generation.fans_out:
        return report_headers(generation.models[0].resolved.versions, generation.num_edits)
    return {
        "x-reft-models": str(len(generation.models)),
        "x-reft-edits": str(generation.num_edits),
    }


def report_headers(versions: Sequence[UsedAdapter], num_edits: int) -> dict[str, str]:
    """Headers that say which adapters answered."""
    return {
        "x-reft-adapter": ",".join(version.digest for version in versions) or "base",
        "x-reft-edits": str(num_edits),
    }


def new_id(prefix: str) -> str:
    """A fresh response id, noted in the request's record."""
    record = current_record()
    record.response_id = f"{prefix}-{uuid.uuid4().hex}"
    return record.response_id


def now() -> int:
    """Seconds since 1970, UTC."""
    return int(time.time())


async def _chain(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    """``first``, then ``rest``."""
    yield first
    async for delta in rest:
        yield delta

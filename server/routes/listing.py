"""Lists that may be long: in pages if the caller likes, and never built on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

from fastapi import Query, Response
from pydantic import BaseModel

NO_NUL = r"^[^\x00]*$"
"""Not every database can look for a character that no name has."""

After = Annotated[
    str, Query(max_length=256, pattern=NO_NUL, description="list what comes after this name")
]
Limit = Annotated[
    int | None, Query(ge=1, le=1_000_000, description="list at most so many; default: all")
]


async def answer_from_thread(build: Callable[[], BaseModel]) -> Response:
    """The response whose body ``build`` makes, in a thread: thousands of cards take a while."""
    body = await asyncio.to_thread(lambda: build().model_dump_json())
    return Response(body, media_type="application/json")

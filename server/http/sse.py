"""Server-sent events: framing, errors inside a stream, and the end of one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping

import structlog
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from reft_core.errors import ReftError
from server.answering.text_chunks import as_document
from server.http.disconnect import ClientGone, unless_gone
from server.http.errors import error_body

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"


def frame(document: str) -> bytes:
    """One event carrying a JSON document, which must be on one line."""
    return f"data: {document}\n\n".encode()


async def frames(chunks: AsyncIterable[BaseModel | str]) -> AsyncIterator[bytes]:
    """The events of a stream of chunks, or of their JSON. It ends with ``[DONE]``, or with an
    error event instead.

    Once a response has started its status cannot change, so an error travels in-band, in
    the same form as in a response of its own. OpenAI's client raises when it meets one.
    """
    try:
        async for chunk in chunks:
            yield frame(chunk if isinstance(chunk, str) else as_document(chunk))
    except Exception as error:
        if isinstance(error, ReftError):
            log.warning("stream failed", error=str(error), kind=type(error).__name__)
        else:
            log.exception("stream failed unexpectedly")
        yield frame(json.dumps(error_body(error)))
        return
    yield DONE


class EventStream(StreamingResponse):
    """A streamed response that always runs ``on_end`` when it is over.

    That is when the last event is sent, the client has gone, or the server cancels it: not
    some time later when the generator happens to be collected.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_end: Callable[[], None],
        headers: Mapping[str, str],
    ) -> None:
        no_buffering = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers={**headers, **no_buffering})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client goes."""
        try:
            await unless_gone(receive, self.stream_response(send))
        except (ClientGone, OSError):
            log.info("client went away during its stream")
        finally:
            self._on_end()

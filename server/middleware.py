"""Around every request: its id, one log line, one metric, and the last catch of exceptions."""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.body import discard
from server.disconnect import ClientGone
from server.errors import error_response
from server.metrics import Metrics

log = structlog.get_logger(__name__)

REQUEST_ID_HEADER = "x-request-id"
CLIENT_GONE_STATUS = 499
"""What logs and metrics show for a client that left; nobody receives it."""

_TOO_LARGE = 413
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_QUIET_ROUTES = {"/healthz", "/readyz", "/metrics"}


class RequestContext:
    """Outermost middleware of the app."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        began_at = time.perf_counter()
        status = 0
        is_read = False

        async def receive_to_end() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body")
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                caller = scope.get("state", {}).get("caller")  # of a request that was let in
                headers.update(caller.headers() if caller else {})
            elif status == _TOO_LARGE and not is_read and not message.get("more_body"):
                await send({**message, "more_body": True})
                await discard(receive)
                message = {**message, "body": b""}
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive_to_end, send_with_id)
            except (ClientGone, ClientDisconnect):
                status = CLIENT_GONE_STATUS
            except Exception as error:
                log.exception("unexpected error")
                if status:  # too late for an answer; the server closes the connection
                    raise
                await error_response(error)(scope, receive, send_with_id)
            finally:
                self._note(scope, status, time.perf_counter() - began_at)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log one finished request."""
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        # Labels a client could choose freely would make series without end.
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.count_http(method, route, status)
        write = log.debug if route in _QUIET_ROUTES else log.info
        write(
            "request",
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(seconds, 4),
        )


def _request_id(headers: Headers) -> str:
    """The caller's own id if it is harmless in headers and logs, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex

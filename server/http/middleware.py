"""Around every request: its id and trace, one log line, one metric, and the last catch of
exceptions."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import nullcontext

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_core.errors import EngineUnavailable
from server.http.body import discard
from server.http.disconnect import ClientGone
from server.http.errors import error_response
from server.http.lifecycle import Lifecycle
from server.observability.metrics import Metrics
from server.observability.record import RequestRecord, open_record
from server.observability.tracing.telemetry import Ended, Telemetry

log = structlog.get_logger(__name__)

REQUEST_ID_HEADER = "x-request-id"
CLIENT_GONE_STATUS = 499
"""What logs and metrics show for a client that left; nobody receives it."""

_TOO_LARGE = 413
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_API_PATHS = ("/v1/", "/admin/")
"""What is traced, and refused once the server ends."""
_QUIET_ROUTES = {"/healthz", "/readyz", "/metrics"}


class RequestContext:
    """Outermost middleware of the app."""

    def __init__(self, app: ASGIApp, metrics: Metrics, telemetry: Telemetry) -> None:
        self._app = app
        self._metrics = metrics
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        lifecycle: Lifecycle = scope["app"].state.services.lifecycle
        is_api = scope["path"].startswith(_API_PATHS)
        span = self._telemetry.begin(headers) if is_api else None
        record = open_record()
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
                if lifecycle.draining:  # so that a client connects to another server next time
                    headers["connection"] = "close"
            elif status == _TOO_LARGE and not is_read and not message.get("more_body"):
                await send({**message, "more_body": True})
                await discard(receive)
                message = {**message, "body": b""}
            await send(message)

        ids = {"request_id": request_id, **(span.log_fields if span else {})}
        with structlog.contextvars.bound_contextvars(**ids):
            try:
                with lifecycle.request() if is_api else nullcontext():
                    await self._app(scope, receive_to_end, send_with_id)
            except EngineUnavailable as error:  # the server is ending: nobody has read the request
                record.error = type(error).__name__
                await error_response(error)(scope, receive, send_with_id)
            except (ClientGone, ClientDisconnect):
                status = CLIENT_GONE_STATUS
            except Exception as error:
                record.error = type(error).__name__
                log.exception("unexpected error")
                if status:  # too late for an answer; the server closes the connection
                    raise
                await error_response(error)(scope, receive, send_with_id)
            finally:
                ended = self._ended(scope, status, began_at, record)
                self._note(ended, record)
                if span is not None:
                    span.end(ended, record)

    def _ended(self, scope: Scope, status: int, began_at: float, record: RequestRecord) -> Ended:
        """How a request ended, in words that no client can choose freely: as labels, those would
        make time series without end."""
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        adapter = self._metrics.adapters.label(record.adapter_keys)
        return Ended(method, route, status, began_at, time.perf_counter(), adapter)

    def _note(self, ended: Ended, record: RequestRecord) -> None:
        """Count and log one finished request."""
        self._metrics.count_http(ended.method, ended.route, ended.status)
        write = log.debug if ended.route in _QUIET_ROUTES else log.info
        write(
            "request",
            method=ended.method,
            route=ended.route,
            status=ended.status,
            seconds=round(ended.ended_at - ended.began_at, 4),
            **record.for_log(),
        )


def _request_id(headers: Headers) -> str:
    """The caller's own id if it is harmless in headers and logs, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex

"""The only place that turns an exception into an HTTP status and OpenAI's error object.

Everything a client gets wrong, and everything that goes wrong here, is answered as
``{"error": {"message", "type", "param", "code"}}``, also inside a running event stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from reft_core.errors import (
    AdapterConflict,
    AdapterError,
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterNotFound,
    AdapterTooLarge,
    DatabaseUnavailable,
    DeadlineExceeded,
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    PermissionDenied,
    PromptTooLong,
    RateLimited,
    ReftError,
    RequestFailed,
    SignatureInvalid,
    StorageUnavailable,
    TrainingError,
    UnsupportedFeature,
    UnsupportedModel,
    explain,
)
from server.observability.record import current_record

log = structlog.get_logger(__name__)


class Answer(NamedTuple):
    """How one class of error is answered."""

    status: int
    type: str
    code: str


_BAD_REQUEST = "invalid_request_error"
_SERVER_FAULT = "server_error"

ANSWERS: dict[type[ReftError], Answer] = {
    ReftError: Answer(500, _SERVER_FAULT, "internal_error"),
    InvalidRequest: Answer(400, _BAD_REQUEST, "invalid_value"),
    PromptTooLong: Answer(400, _BAD_REQUEST, "context_length_exceeded"),
    UnsupportedFeature: Answer(400, _BAD_REQUEST, "unsupported_parameter"),
    AdapterError: Answer(400, _BAD_REQUEST, "adapter_error"),
    AdapterFileInvalid: Answer(400, _BAD_REQUEST, "adapter_file_invalid"),
    AdapterTooLarge: Answer(413, _BAD_REQUEST, "adapter_too_large"),
    SignatureInvalid: Answer(400, _BAD_REQUEST, "signature_invalid"),
    AdapterMismatch: Answer(400, _BAD_REQUEST, "adapter_mismatch"),
    AdapterNotFound: Answer(404, _BAD_REQUEST, "model_not_found"),
    AdapterConflict: Answer(409, _BAD_REQUEST, "adapter_conflict"),
    PermissionDenied: Answer(403, "insufficient_permissions", "insufficient_permissions"),
    RateLimited: Answer(429, "rate_limit_error", "rate_limit_exceeded"),
    DatabaseUnavailable: Answer(503, _SERVER_FAULT, "database_unavailable"),
    StorageUnavailable: Answer(503, _SERVER_FAULT, "storage_unavailable"),
    UnsupportedModel: Answer(500, _SERVER_FAULT, "unsupported_model"),
    EngineError: Answer(500, _SERVER_FAULT, "engine_error"),
    EngineOverloaded: Answer(429, "rate_limit_error", "engine_overloaded"),
    DeadlineExceeded: Answer(504, _SERVER_FAULT, "deadline_exceeded"),
    EngineUnavailable: Answer(503, _SERVER_FAULT, "engine_unavailable"),
    RequestFailed: Answer(500, _SERVER_FAULT, "request_failed"),
    TrainingError: Answer(400, _BAD_REQUEST, "training_error"),
}

_HTTP_ANSWERS = {
    401: Answer(401, "authentication_error", "invalid_api_key"),
    404: Answer(404, _BAD_REQUEST, "not_found"),
    405: Answer(405, _BAD_REQUEST, "method_not_allowed"),
    408: Answer(408, _BAD_REQUEST, "request_timeout"),
    413: Answer(413, _BAD_REQUEST, "request_too_large"),
    415: Answer(415, _BAD_REQUEST, "unsupported_media_type"),
    431: Answer(431, _BAD_REQUEST, "request_header_fields_too_large"),
}

_INTERNAL = "the server failed on this request; its log has the details under the request id"
_RETRY_UNAVAILABLE_S = 5
_UNAVAILABLE = (EngineUnavailable, DatabaseUnavailable, StorageUnavailable)


def documented_statuses() -> dict[int, list[str]]:
    """Every status that an error may be answered with, and the codes that go with it."""
    found: dict[int, list[str]] = {}
    for answer in (*ANSWERS.values(), *_HTTP_ANSWERS.values()):
        codes = found.setdefault(answer.status, [])
        if answer.code not in codes:
            codes.append(answer.code)
    del found[405]  # a route has no error for being another
    return dict(sorted(found.items()))


def answer_for(error: ReftError) -> Answer:
    """Status, type and code of an error: those of its nearest class in the table."""
    return next(ANSWERS[cls] for cls in type(error).__mro__ if cls in ANSWERS)


def error_body(error: Exception) -> dict[str, Any]:
    """OpenAI's error object for any exception; internals of unexpected ones stay inside."""
    if isinstance(error, ReftError):
        answer = answer_for(error)
        return _body(error.message, answer, error.field)
    return _body(_INTERNAL, ANSWERS[ReftError])


def http_error_body(status: int, message: str) -> dict[str, Any]:
    """OpenAI's error object for one of HTTP's own errors in the table."""
    return _body(message, _HTTP_ANSWERS[status])


def error_response(error: Exception) -> JSONResponse:
    """The whole response for an exception that no response has been started for."""
    status = answer_for(error).status if isinstance(error, ReftError) else 500
    headers = {}
    if isinstance(error, EngineOverloaded | RateLimited):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, _UNAVAILABLE):
        headers["Retry-After"] = str(_RETRY_UNAVAILABLE_S)
    return JSONResponse(error_body(error), status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of ``app`` through this module."""
    app.add_exception_handler(ReftError, _on_reft_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_reft_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error raised on purpose."""
    response = error_response(error)
    current_record().error = type(error).__name__
    if response.status_code >= 500:
        log.warning("request failed", error=str(error), kind=type(error).__name__)
    return response


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a request whose body or parameters do not have the declared form."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    message, param = describe_validation_error(found[0])
    if len(found) > 1:
        message += f" (and {len(found) - 1} more)"
    return JSONResponse(_body(message, ANSWERS[InvalidRequest], param), 400)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer an unknown path or method, a wrong key, a body over its cap."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    answer = _HTTP_ANSWERS.get(status)
    if answer is None:
        kind = _BAD_REQUEST if status < 500 else _SERVER_FAULT
        answer = Answer(status, kind, "http_error")
    message = str(error.detail)
    if status == 404 and message == "Not Found":
        message = f"path: got {request.url.path!r}, expected one of the paths in /docs"
    elif status == 405:
        allowed = _methods_of(request) or "another method"
        message = f"method: got {request.method!r}, expected {allowed} for this path"
        return JSONResponse(_body(message, answer), status, headers={"Allow": allowed})
    return JSONResponse(_body(message, answer), status, headers=error.headers)


def _methods_of(request: Request) -> str:
    """The methods of a path, of all its routes: the framework names those of the first."""
    found = []
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        scope = {**request.scope, "method": method}
        matches = (route.matches(scope)[0] for route in request.app.router.routes)
        if any(match is Match.FULL for match in matches):
            found.append(method)
    return ", ".join(found)


def describe_validation_error(error: Mapping[str, Any]) -> tuple[str, str]:
    """Message and dotted field path of one of pydantic's error entries."""
    kind, where = error["type"], error["loc"]
    if kind == "json_invalid":
        position = where[-1]
        return f"body: not valid JSON (at character {position}: {error['ctx']['error']})", "body"
    parts = where[1:] if where[0] in ("body", "query", "path", "header") else where
    field = ".".join(str(part) for part in parts) or "body"
    if kind == "missing":
        return f"{field}: missing, but required", field
    if kind == "extra_forbidden":
        return f"{field}: not a parameter of this request", field
    allowed = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return explain(field, error.get("input"), allowed[:1].lower() + allowed[1:]), field


def _body(message: str, answer: Answer, param: str | None = None) -> dict[str, Any]:
    """The error object. Lone surrogates, which no UTF-8 body can hold, are escaped."""
    fields = {"message": message, "type": answer.type, "param": param, "code": answer.code}
    return {
        "error": {
            key: value.encode("utf-8", "backslashreplace").decode() if value else value
            for key, value in fields.items()
        }
    }

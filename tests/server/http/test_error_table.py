"""Every way a request can fail, over HTTP: status, type, param and code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

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
)
from server.http.errors import ANSWERS
from tests.factories import random_adapter_bytes
from tests.server.conftest import ADMIN, API_KEY
from tests.server.fakes import MODEL, make_adapter, make_tiny_loaded

BAD, FAULT = "invalid_request_error", "server_error"
CHAT = {"model": MODEL.name, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL.name, "prompt": "hi"}


@dataclass(frozen=True)
class Case:
    """A request, what goes wrong with it, and how it must be answered."""

    what: str
    status: int
    type: str
    param: str | None
    code: str
    method: str = "POST"
    path: str = "/v1/completions"
    json: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any, Any], object] = lambda server, engine: None
    error: type[ReftError] | None = None
    """The class behind it."""
    answer_headers: tuple[str, ...] = ()


def refusing(error: ReftError) -> Callable[[Any, Any], object]:
    return lambda server, engine: setattr(engine, "refuse_with", error)


def failing(error: ReftError) -> Callable[[Any, Any], object]:
    def prepare(server: Any, engine: Any) -> None:
        engine.fail_after, engine.failure = 1, error

    return prepare


def upload_of(data: bytes, name: str = "tone") -> dict[str, Any]:
    return {"path": f"/admin/adapters/{name}", "content": data, "headers": ADMIN}


def foreign() -> bytes:
    return random_adapter_bytes(make_tiny_loaded().description)


CASES = [
    Case("a value out of range", 400, BAD, "temperature", "invalid_value",
         json=TEXT | {"temperature": 9}, error=InvalidRequest),
    Case("a value of another type", 400, BAD, "n", "invalid_value", json=TEXT | {"n": "many"}),
    Case("a field that is missing", 400, BAD, "prompt", "invalid_value",
         json={"model": MODEL.name}),
    Case("a field nobody knows", 400, BAD, "temprature", "invalid_value",
         json=TEXT | {"temprature": 1}),
    Case("a field of reft nobody knows", 400, BAD, "reft.strenght", "invalid_value",
         json=TEXT | {"reft": {"strenght": 1}}),
    Case("no JSON", 400, BAD, "body", "invalid_value", content=b"{",
         headers={"content-type": "application/json"}),
    Case("no object", 400, BAD, "body", "invalid_value", json=[1]),
    Case("a prompt that is too long", 400, BAD, "prompt", "context_length_exceeded",
         json=TEXT | {"prompt": "x" * 400}, error=PromptTooLong),
    Case("a feature we lack", 400, BAD, "tools", "unsupported_parameter",
         path="/v1/chat/completions", json=CHAT | {"tools": [{"type": "function"}]},
         error=UnsupportedFeature),
    Case("an unknown model", 404, BAD, "model", "model_not_found",
         json=TEXT | {"model": "nope"}, error=AdapterNotFound),
    Case("an unknown version", 404, BAD, "model", "model_not_found",
         json=TEXT | {"model": f"{MODEL.name}@7"}),
    Case("an unknown model in the path", 404, BAD, "model", "model_not_found",
         method="GET", path="/v1/models/nope"),
    Case("no adapter file", 400, BAD, "body", "adapter_file_invalid", **upload_of(b"x"),
         error=AdapterFileInvalid),
    Case("an adapter file over the cap", 413, BAD, None, "request_too_large",
         **upload_of(make_adapter(1)), settings={"max_adapter_bytes": 1024}),
    Case("an inline adapter over the cap", 413, BAD, "reft.inline", "adapter_too_large",
         json=TEXT | {"reft": {"inline": "A" * 3000}},
         settings={"allow_inline_adapters": True, "max_inline_adapter_bytes": 1024},
         error=AdapterTooLarge),
    Case("an adapter of another model", 400, BAD, "base.hidden_size", "adapter_mismatch",
         **upload_of(foreign()), error=AdapterMismatch),
    Case("the base model's name", 409, BAD, "name", "adapter_conflict",
         **upload_of(make_adapter(1), MODEL.name), error=AdapterConflict),
    Case("a full queue", 429, "rate_limit_error", None, "engine_overloaded", json=TEXT,
         prepare=refusing(EngineOverloaded("the queue is full")), error=EngineOverloaded,
         answer_headers=("retry-after",)),
    Case("a server that ends", 503, FAULT, None, "engine_unavailable", json=TEXT,
         prepare=refusing(EngineUnavailable("the engine is draining")), error=EngineUnavailable,
         answer_headers=("retry-after",)),
    Case("a request that took too long", 504, FAULT, None, "deadline_exceeded", json=TEXT,
         prepare=failing(DeadlineExceeded("time is up")), error=DeadlineExceeded),
    Case("a request that failed", 500, FAULT, None, "request_failed", json=TEXT,
         prepare=failing(RequestFailed("decode failed")), error=RequestFailed),
    Case("a stream that failed before its first token", 500, FAULT, None, "request_failed",
         json=TEXT | {"stream": True}, error=None, prepare=lambda server, engine:
         (setattr(engine, "fail_after", 0), setattr(engine, "failure", RequestFailed("no")))),
    Case("a bug", 500, FAULT, None, "internal_error", json=TEXT,
         prepare=lambda server, engine: setattr(engine, "refuse_with", ValueError("secret"))),
    Case("no key", 401, "authentication_error", None, "invalid_api_key", json=TEXT,
         settings={"api_key": API_KEY}, answer_headers=("www-authenticate",)),
    Case("a wrong key", 401, "authentication_error", None, "invalid_api_key", json=TEXT,
         headers={"Authorization": "Bearer wrong"}, settings={"api_key": API_KEY}),
    Case("no admin key", 401, "authentication_error", None, "invalid_api_key",
         method="GET", path="/admin/adapters"),
    Case("a key that may not", 403, "insufficient_permissions", None, "insufficient_permissions",
         json=TEXT, prepare=refusing(PermissionDenied("no")), error=PermissionDenied),
    Case("a key over its rate", 429, "rate_limit_error", None, "rate_limit_exceeded", json=TEXT,
         prepare=refusing(RateLimited("too many")), error=RateLimited,
         answer_headers=("retry-after",)),
    Case("a database that is away", 503, FAULT, None, "database_unavailable", json=TEXT,
         prepare=refusing(DatabaseUnavailable("away")), error=DatabaseUnavailable,
         answer_headers=("retry-after",)),
    Case("a store that is away", 503, FAULT, None, "storage_unavailable", json=TEXT,
         prepare=refusing(StorageUnavailable("away")), error=StorageUnavailable,
         answer_headers=("retry-after",)),
    Case("a signature that is wrong", 400, BAD, None, "signature_invalid", json=TEXT,
         prepare=refusing(SignatureInvalid("not of this file")), error=SignatureInvalid),
    Case("an unknown path", 404, BAD, None, "not_found", path="/v1/embeddings", json=TEXT),
    Case("another method", 405, BAD, None, "method_not_allowed", method="DELETE",
         answer_headers=("allow",)),
    Case("a body over its cap", 413, BAD, None, "request_too_large",
         json=TEXT | {"prompt": "x" * 2000}, settings={"max_body_bytes": 1024}),
    Case("a body that is no JSON by its type", 415, BAD, None, "unsupported_media_type",
         content=b"{}", headers={"content-type": "text/plain"}),
]  # fmt: skip
NEVER_OVER_HTTP = {
    ReftError: "the root: only its subclasses are raised",
    AdapterError: "a branch: only its subclasses are raised",
    EngineError: "a branch: only its subclasses are raised",
    UnsupportedModel: "ends the start of a server",
    TrainingError: "ends a training",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what.replace(" ", "-"))
def test_how_it_is_answered(in_process, engine, case):
    with in_process(**case.settings) as server:
        case.prepare(server, engine)
        answer = server.http.request(
            case.method, case.path, json=case.json, content=case.content, headers=case.headers
        )
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    found = (answer.status_code, error["type"], error["param"], error["code"])
    assert found == (case.status, case.type, case.param, case.code), error["message"]
    assert error["message"]
    assert "secret" not in error["message"]
    assert "Traceback" not in answer.text
    for name in case.answer_headers:
        assert answer.headers[name]
    assert answer.headers["x-request-id"]
    if case.error is not None:
        assert ANSWERS[case.error][:2] == (case.status, case.type)
        assert ANSWERS[case.error].code == case.code


def test_every_class_of_error_is_in_the_table():
    assert {case.error for case in CASES if case.error} | set(NEVER_OVER_HTTP) == set(ANSWERS)

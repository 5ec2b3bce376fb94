"""Every error the project raises on purpose.

::

    ReftError
    ├── InvalidRequest            a value the caller sent is out of its range
    │   ├── PromptTooLong         prompt (or prompt + max_tokens) exceeds the context
    │   └── UnsupportedFeature    a known option this server does not offer
    ├── AdapterError
    │   ├── AdapterFileInvalid    the bytes are not an adapter file we accept
    │   │   └── AdapterTooLarge   the bytes exceed the size cap
    │   ├── SignatureInvalid      a signature is missing, or not of this file by the trusted key
    │   ├── AdapterMismatch       a good file, made for another base model
    │   ├── AdapterNotFound       no adapter of that name, version or digest
    │   └── AdapterConflict       the operation contradicts what is stored
    ├── PermissionDenied          the caller's key does not reach so far
    ├── RateLimited               the caller's key has used up its rate; try again later
    ├── DatabaseUnavailable       the server's database does not answer
    ├── StorageUnavailable        the server's store of adapter files does not answer, or is full
    ├── UnsupportedModel          the base model lacks a structure we need
    ├── EngineError
    │   ├── EngineOverloaded      the queue is full; try again later
    │   ├── DeadlineExceeded      the request's own time was up
    │   ├── EngineUnavailable     the engine is draining, stopped or dead
    │   └── RequestFailed         this one request failed while it ran
    └── TrainingError             a training config or data set cannot be used

Messages follow one form: *field*: got *value*, expected *allowed*. HTTP status codes
are the server's business (``server/http/errors.py``).
"""

from __future__ import annotations

from copy import copy
from typing import Self

_LONGEST_ALLOWED = 1000


class ReftError(Exception):
    """Base class. ``field`` names the offending input, when there is one.

    A ``reason`` is for operators: ``str`` has it, and so have logs, but not ``message``, which is
    what callers of a server are told.
    """

    def __init__(self, message: str, *, field: str | None = None, reason: str = "") -> None:
        super().__init__(f"{message}: {reason}" if reason else message)
        self.message = message
        self.field = None if field is None else shown(field)

    def within(self, place: str) -> Self:
        """The same error, about ``place``: one of several parts of what the caller sent."""
        found = copy(self)
        found.message = f"{place}: {self.message}"
        found.field = place
        found.args = (found.message,)
        return found


def explain(field: str, value: object, allowed: str) -> str:
    """One sentence naming the field, what it held (shortened) and what it may hold."""
    held = repr(value)
    if len(held) > 120:
        held = held[:117] + "..."
    if len(allowed) > _LONGEST_ALLOWED:  # some name what a file or a request holds
        allowed = allowed[: _LONGEST_ALLOWED - 3] + "..."
    return f"{shown(field)}: got {held}, expected {allowed}"


def shown(text: str) -> str:
    """``text``, which a caller may have chosen, shortened and with no control characters."""
    found = text if text.isprintable() else repr(text)[1:-1]
    return found if len(found) <= 120 else found[:117] + "..."


class InvalidRequest(ReftError):
    """A value the caller sent is out of its range."""

    @classmethod
    def because(cls, field: str, value: object, allowed: str) -> InvalidRequest:
        """The error for ``field`` holding ``value`` where ``allowed`` was expected."""
        return cls(explain(field, value, allowed), field=field)


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and the tokens asked for, exceed the context."""


class UnsupportedFeature(InvalidRequest):
    """A known option of the API that this server does not offer."""


class AdapterError(ReftError):
    """Something is wrong with an adapter."""


class AdapterFileInvalid(AdapterError):
    """The bytes are not an adapter file we accept."""

    @classmethod
    def because(cls, field: str, value: object, allowed: str) -> AdapterFileInvalid:
        """The error for ``field`` of the file holding ``value``, not ``allowed``."""
        return cls(explain(field, value, allowed), field=field)


class AdapterTooLarge(AdapterFileInvalid):
    """The file exceeds the size cap."""


class SignatureInvalid(AdapterError):
    """A signature is missing where it is required, or not of this file by the trusted key."""


class AdapterMismatch(AdapterError):
    """A well-formed adapter that was made for another base model."""


class AdapterNotFound(AdapterError):
    """No adapter has that name, version or digest."""


class AdapterConflict(AdapterError):
    """The operation contradicts what is stored."""


class PermissionDenied(ReftError):
    """The caller is known, and their key does not allow this."""


class RateLimited(ReftError):
    """The caller's key has used up its rate. Retry after ``retry_after_s`` seconds."""

    def __init__(
        self, message: str, *, field: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s


class DatabaseUnavailable(ReftError):
    """The server's database does not answer."""


class StorageUnavailable(ReftError):
    """The server's store of adapter files does not answer, or is full."""


class UnsupportedModel(ReftError):
    """The base model lacks a structure the engine or an adapter needs."""


class EngineError(ReftError):
    """The engine could not finish a request."""


class EngineOverloaded(EngineError):
    """The waiting queue is full. Retry after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(EngineError):
    """The engine is draining, stopped or dead."""


class DeadlineExceeded(EngineError):
    """The request did not end within its deadline."""


class RequestFailed(EngineError):
    """This request failed while it ran; others were not touched."""


class TrainingError(ReftError):
    """A training configuration or data set cannot be used."""

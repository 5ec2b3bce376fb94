"""Route classes that check a request at the door, before any of its body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from server.http.body import capped, check_declared_length, require_json
from server.keys import Caller, Principal
from server.keys.door import Need
from server.protocol.common import ErrorBody
from server.services import services_of

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as it is"},
    "5XX": {"model": ErrorBody, "description": "The server failed or is shutting down"},
}


class KeyedRoute(APIRoute):
    """A route that needs a key, and counts against its rates until the response is sent."""

    need: ClassVar[Need] = "any"

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, as somebody, or refuse it."""
        request = Request(scope)
        services = services_of(request)
        principal = await services.door.admit(request.headers.get("authorization", ""), self.need)
        self.check(principal, scope)
        caller = services.rates.caller(principal)
        request.state.caller = caller
        if principal.id:
            structlog.contextvars.bind_contextvars(key=principal.id, tenant=principal.tenant)
        with caller.open():
            await super().handle(scope, receive, send)

    def check(self, principal: Principal, scope: Scope) -> None:
        """Raise :class:`PermissionDenied` for a key that may not ask for this."""


class JsonRoute(KeyedRoute):
    """One whose bodies are JSON within the cap."""

    def get_route_handler(self) -> Handler:
        """The route's handler behind the checks."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            if request.method == "POST":
                settings = services_of(request).settings
                require_json(request)
                check_declared_length(request, settings.max_body_bytes)
                receive = capped(request.receive, settings.max_body_bytes, settings.body_timeout_s)
                request = Request(request.scope, receive)
            return await handle(request)

        return guarded


class ApiRoute(JsonRoute):
    """A route of ``/v1``: needs a user key where the server needs keys."""

    need = "user"


class AdminRoute(JsonRoute):
    """A route of ``/admin``: needs an admin key, of some tenant or of none."""

    need = "admin"


class AdaptersRoute(KeyedRoute):
    """A route of ``/admin/adapters``: needs a key that manages adapters, its tenant's at least."""

    need = "adapters"

    def check(self, principal: Principal, scope: Scope) -> None:
        """Refuse an adapter's name that is not in the key's scope."""
        name = scope["path_params"].get("name")
        if name is not None:
            principal.check_may_use(name.partition("@")[0])


def caller_of(request: Request) -> Caller:
    """Who makes a request that a :class:`KeyedRoute` has let in."""
    caller = request.state.caller
    assert isinstance(caller, Caller), "only a keyed route knows its caller"
    return caller


def make_router(route_class: type[APIRoute] = APIRoute, *, tag: str) -> APIRouter:
    """A router whose routes are of ``route_class`` and document their errors."""
    return APIRouter(route_class=route_class, tags=[tag], responses=ERROR_RESPONSES)

"""Route classes that check a request at the door, before any of its body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from server.auth import require_key
from server.body import capped, check_declared_length, require_json
from server.protocol.common import ErrorBody
from server.services import services_of

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as it is"},
    "5XX": {"model": ErrorBody, "description": "The server failed or is shutting down"},
}


class ApiRoute(APIRoute):
    """A route of ``/v1``: needs the API key if one is set; bodies are JSON within the cap."""

    def get_route_handler(self) -> Handler:
        """The route's handler behind the checks."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            settings = services_of(request).settings
            require_key(request, settings.api_key)
            if request.method == "POST":
                require_json(request)
                check_declared_length(request, settings.max_body_bytes)
                receive = capped(request.receive, settings.max_body_bytes, settings.body_timeout_s)
                request = Request(request.scope, receive)
            return await handle(request)

        return guarded


class AdminRoute(APIRoute):
    """A route of ``/admin``: needs the admin key. Exists only where one is set."""

    def get_route_handler(self) -> Handler:
        """The route's handler behind the check."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            admin_key = services_of(request).settings.admin_key
            assert admin_key is not None, "admin routes exist only with an admin key"
            require_key(request, admin_key)
            return await handle(request)

        return guarded


def make_router(route_class: type[APIRoute] = APIRoute, *, tag: str) -> APIRouter:
    """A router whose routes are of ``route_class`` and document their errors."""
    return APIRouter(route_class=route_class, tags=[tag], responses=ERROR_RESPONSES)

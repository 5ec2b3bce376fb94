"""``/openapi.json`` and the pages that show it. They need a key where the API does."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse

from server.routes.guards import KeyedRoute, make_router

router = make_router(KeyedRoute, tag="documentation")

_DOCUMENT = "/openapi.json"


@router.get(_DOCUMENT, include_in_schema=False)
async def openapi(request: Request) -> dict[str, Any]:
    """The API's description."""
    app: FastAPI = request.app
    return app.openapi()


@router.get("/docs", include_in_schema=False)
async def swagger(request: Request) -> HTMLResponse:
    """The description as Swagger UI shows it."""
    return get_swagger_ui_html(openapi_url=_DOCUMENT, title=request.app.title)


@router.get("/redoc", include_in_schema=False)
async def redoc(request: Request) -> HTMLResponse:
    """The description as ReDoc shows it."""
    return get_redoc_html(openapi_url=_DOCUMENT, title=request.app.title)

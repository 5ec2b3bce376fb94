"""``/healthz``, ``/readyz`` and ``/metrics``: for orchestrators and Prometheus; no key."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from server.routes.guards import make_router
from server.services import services_of

router = make_router(tag="operations")


class Status(BaseModel):
    """How the server is."""

    status: str


_DOWN: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "It is not"}}


@router.get("/healthz", response_model=Status, responses=_DOWN)
async def health(request: Request) -> Response:
    """200 while the process is worth keeping; 503 asks for a restart."""
    if services_of(request).lifecycle.healthy:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "the engine has died"}, 503)


@router.get("/readyz", response_model=Status, responses=_DOWN)
async def readiness(request: Request) -> Response:
    """200 while new requests are welcome; 503 when starting, draining or broken."""
    lifecycle = services_of(request).lifecycle
    if lifecycle.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "draining" if lifecycle.draining else "not ready"}, 503)


_EXPOSITION = {
    kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")
}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": _EXPOSITION}},
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(
        encode(services_of(request).metrics.registry), headers={"Content-Type": content_type}
    )

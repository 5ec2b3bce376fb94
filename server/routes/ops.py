"""``/healthz``, ``/readyz`` and ``/metrics``: for orchestrators and Prometheus.

The first two need no key, ever; the third needs an operator's unless the settings show it to all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from pydantic import BaseModel

from reft_core.errors import DatabaseUnavailable
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
    state = await services_of(request).readiness.check()
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


_EXPOSITION = {
    kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")
}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": _EXPOSITION}},
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics. What tells tenants and adapters apart is for operators alone."""
    services = services_of(request)
    authorization = request.headers.get("authorization", "")
    if not services.settings.shows_metrics:
        await services.door.admit(authorization, "operator")
    await services.readiness.check()
    registries = [services.metrics.registry]
    with suppress(DatabaseUnavailable):  # which these metrics are to tell of
        if await services.door.shows_all(authorization):
            registries.append(services.metrics.for_operators)
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(_Together(registries)), headers={"Content-Type": content_type})


class _Together(Collector):
    """Several registries as one."""

    def __init__(self, registries: list[CollectorRegistry]) -> None:
        self._registries = registries

    def collect(self) -> Iterator[Metric]:
        """What all of them collect."""
        for registry in self._registries:
            yield from registry.collect()

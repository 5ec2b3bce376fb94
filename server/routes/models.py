"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response

from server.answering.named import look_up
from server.keys import Principal
from server.protocol.models import ModelCard, ModelList
from server.registry import Registry, Version
from server.routes.guards import ApiRoute, caller_of, make_router
from server.routes.listing import After, Limit, answer_from_thread
from server.services import services_of

router = make_router(ApiRoute, tag="models")


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request, after: After = "", limit: Limit = None) -> Response:
    """The base model, then every adapter's current version, by name: those the key may use.

    ``after`` a name there are only adapters; ``limit`` counts adapters.
    """
    services = services_of(request)
    engine = services.engine

    principal = caller_of(request).principal

    def build() -> ModelList:
        versions = _usable(services.registry, principal, after, limit)
        base = ModelCard.of_base(engine.model, services.started_at, engine.max_model_len)
        adapters = [ModelCard.of_adapter(v, engine.model, engine.max_model_len) for v in versions]
        with_base = not after and principal.may_use(engine.model.name)
        return ModelList(data=[base, *adapters] if with_base else adapters)

    return await answer_from_thread(build)


def _usable(
    registry: Registry, principal: Principal, after: str, limit: int | None
) -> list[Version]:
    """A page of the current versions of what the principal can see and may use."""
    found: list[Version] = []
    while True:
        page = registry.all_current(after, limit, tenant=principal.tenant)
        found += [version for version in page if principal.may_use(version.name)]
        if limit is None or len(page) < limit or len(found) >= limit:
            return found[:limit]
        after = page[-1].name


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, request: Request) -> ModelCard:
    """One model, by any form of its name that requests may use."""
    services = services_of(request)
    engine = services.engine
    principal = caller_of(request).principal
    version = await asyncio.to_thread(look_up, model_id, services.registry, principal)
    if version is None:
        return ModelCard.of_base(engine.model, services.started_at, engine.max_model_len)
    return ModelCard.of_adapter(version, engine.model, engine.max_model_len, model_id)

"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response

from server.protocol.models import ModelCard, ModelList
from server.routes.guards import ApiRoute, make_router
from server.routes.listing import After, Limit, answer_from_thread
from server.services import services_of

router = make_router(ApiRoute, tag="models")


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request, after: After = "", limit: Limit = None) -> Response:
    """The base model, then every adapter's current version, by name.

    ``after`` a name there are only adapters; ``limit`` counts adapters.
    """
    services = services_of(request)
    engine = services.engine

    def build() -> ModelList:
        versions = services.registry.all_current(after, limit)
        base = ModelCard.of_base(engine.model, services.started_at, engine.max_model_len)
        adapters = [ModelCard.of_adapter(v, engine.model, engine.max_model_len) for v in versions]
        return ModelList(data=adapters if after else [base, *adapters])

    return await answer_from_thread(build)


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, request: Request) -> ModelCard:
    """One model, by any form of its name that requests may use."""
    services = services_of(request)
    engine = services.engine
    version = await asyncio.to_thread(services.registry.resolve, model_id)
    if version is None:
        return ModelCard.of_base(engine.model, services.started_at, engine.max_model_len)
    return ModelCard.of_adapter(version, engine.model, engine.max_model_len, model_id)

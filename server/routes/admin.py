"""``/admin/adapters``: upload, list, inspect and delete adapters."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import HTTPException, Request, Response

from server.body import read_capped
from server.protocol.models import (
    AdapterDetail,
    AdapterList,
    DeleteAnswer,
    UploadAnswer,
    VersionCard,
)
from server.routes.guards import AdminRoute, make_router
from server.routes.listing import After, Limit, answer_from_thread
from server.services import Services, services_of

router = make_router(AdminRoute, tag="admin")

_BINARY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "An adapter file, as it is on disk",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "/admin/adapters/{name}",
    status_code=201,
    openapi_extra=_BINARY_BODY,
    responses={200: {"model": UploadAnswer, "description": "These bytes were known already"}},
)
async def upload_adapter(name: str, request: Request, response: Response) -> UploadAnswer:
    """Store the adapter file in the body and make it what ``name`` means.

    The same bytes again are no error and no new version. Other bytes become the next
    version; requests already running keep the version they started with.
    """
    services = services_of(request)
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise HTTPException(
            415, "content-type: got a form, expected the file's bytes as the body itself"
        )
    settings = services.settings
    data = await read_capped(request, settings.max_adapter_bytes, settings.upload_timeout_s)
    uploaded = await asyncio.to_thread(services.registry.upload, name, data)
    if not uploaded.created:
        response.status_code = 200
    version = uploaded.version
    await services.pins.follow(version.name)
    users = services.residency.num_users(version.digest)
    return UploadAnswer(**VersionCard.of(version, users).model_dump(), created=uploaded.created)


@router.get("/admin/adapters", response_model=AdapterList)
async def list_adapters(request: Request, after: After = "", limit: Limit = None) -> Response:
    """The current version of every adapter, by name."""
    services = services_of(request)
    versions = await asyncio.to_thread(services.registry.all_current, after, limit)
    users = [services.residency.num_users(version.digest) for version in versions]

    def build() -> AdapterList:
        cards = map(VersionCard.of, versions, users)
        return AdapterList(data=list(cards))

    return await answer_from_thread(build)


@router.get("/admin/adapters/{name}")
async def get_adapter(name: str, request: Request) -> AdapterDetail:
    """All versions of one adapter, and the current one's spec."""
    services = services_of(request)
    current = await asyncio.to_thread(services.registry.current, name)
    versions = await asyncio.to_thread(services.registry.versions, name)
    return AdapterDetail(
        name=name,
        current=current.number,
        versions=_cards(services, versions),
        spec=current.spec.model_dump(mode="json"),
    )


@router.delete("/admin/adapters/{name}")
async def delete_adapter(name: str, request: Request) -> DeleteAnswer:
    """Delete an adapter with all its versions. Requests that use it finish undisturbed."""
    services = services_of(request)
    deleted = await asyncio.to_thread(services.registry.delete, name)
    await services.pins.drop(name)
    for digest in deleted.orphaned:
        services.residency.forget(digest)
    return DeleteAnswer(
        name=name, deleted_versions=[version.number for version in deleted.versions]
    )


def _cards(services: Services, versions: list[Any]) -> list[VersionCard]:
    """The versions' cards, with how many requests use each now."""
    return [VersionCard.of(v, services.residency.num_users(v.digest)) for v in versions]

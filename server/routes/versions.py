"""``/admin/adapters/{name}/…``: what a name means, what stays loaded, and the files themselves."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Annotated

from fastapi import Path, Request, Response

from server.protocol.models import DeleteAnswer, VersionCard
from server.registry import Version
from server.routes.acting import Tenant, actor_of, users_of
from server.routes.admin import answer_delete
from server.routes.guards import AdaptersRoute, caller_of, make_router
from server.services import services_of

router = make_router(AdaptersRoute, tag="admin")

_Number = Annotated[int, Path(ge=1, le=999_999_999)]


@router.post("/admin/adapters/{name}/versions/{number}/promote")
async def promote_version(
    name: str, number: _Number, request: Request, tenant: Tenant
) -> VersionCard:
    """Make one version what ``name`` means."""
    registry = services_of(request).registry
    promote = partial(registry.promote, name, number, tenant=tenant, actor=actor_of(request))
    return await _answer(request, await asyncio.to_thread(promote))


@router.post("/admin/adapters/{name}/rollback")
async def roll_back(name: str, request: Request, tenant: Tenant) -> VersionCard:
    """Make current again what was before. To roll back twice is to come back."""
    registry = services_of(request).registry
    undo = partial(registry.roll_back, name, tenant=tenant, actor=actor_of(request))
    return await _answer(request, await asyncio.to_thread(undo))


@router.put("/admin/adapters/{name}/pin")
async def pin_adapter(name: str, request: Request, tenant: Tenant) -> VersionCard:
    """Keep what ``name`` means loaded, on every server, whatever else is asked for.

    Other servers follow within seconds. Where memory has no room it is only logged. Memory is
    everybody's, so this takes an admin key of no tenant.
    """
    return await _pin(name, request, tenant, pinned=True)


@router.delete("/admin/adapters/{name}/pin")
async def unpin_adapter(name: str, request: Request, tenant: Tenant) -> VersionCard:
    """Keep it loaded no longer than others. What the server's settings pin stays."""
    return await _pin(name, request, tenant, pinned=False)


@router.delete("/admin/adapters/{name}/versions/{number}")
async def delete_version(
    name: str, number: _Number, request: Request, tenant: Tenant
) -> DeleteAnswer:
    """Delete one version, and with the last one the name. Requests that use it finish."""
    services = services_of(request)
    delete = partial(services.registry.delete_version, name, number, tenant=tenant)
    deleted = await asyncio.to_thread(delete, actor=actor_of(request))
    return await answer_delete(services, name, deleted)


@router.get(
    "/admin/adapters/{name}/file",
    response_class=Response,
    responses={
        200: {
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
            "description": "The file; `ETag` and `Repr-Digest` have its SHA-256",
        },
        304: {"description": "The caller has it: `If-None-Match` names it"},
    },
)
async def download_file(name: str, request: Request, tenant: Tenant) -> Response:
    """The exact bytes that were uploaded, of `name`, `name@3` or `name@sha256:…`."""
    registry = services_of(request).registry
    version = await asyncio.to_thread(registry.stored, name, tenant)
    tag = f'"{version.digest}"'
    headers = {
        "ETag": tag,
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(version.digest)).decode()}:",
        "Content-Disposition": (
            f'attachment; filename="{version.name}@{version.number}.safetensors"'
        ),
    }
    known = request.headers.get("if-none-match", "")
    if tag in {each.strip().removeprefix("W/") for each in known.split(",")}:
        return Response(status_code=304, headers=headers)
    data = await asyncio.to_thread(registry.read, version.digest)
    return Response(data, media_type="application/octet-stream", headers=headers)


async def _pin(name: str, request: Request, tenant: str, *, pinned: bool) -> VersionCard:
    """Change whether a name is pinned."""
    caller_of(request).principal.check_is_operator()
    registry = services_of(request).registry
    change = partial(registry.pin, name, pinned, tenant=tenant, actor=actor_of(request))
    return await _answer(request, await asyncio.to_thread(change))


async def _answer(request: Request, version: Version) -> VersionCard:
    """The card of what a name means now, once memory is as it should be."""
    await services_of(request).pins.refresh()
    return VersionCard.of(version, users_of(request, version.digest))

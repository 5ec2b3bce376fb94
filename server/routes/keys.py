"""``/admin/keys``: create, list and revoke keys.

An admin key of a tenant sees and changes that tenant's keys alone, and makes keys of it alone.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import structlog
from fastapi import HTTPException, Path, Request, Response

from reft_core.errors import explain
from server.keys import NewKey
from server.protocol.keys import CreatedKey, KeyCard, KeyList
from server.routes.acting import AnyTenant
from server.routes.guards import AdminRoute, caller_of, make_router
from server.routes.listing import NO_NUL
from server.services import services_of

log = structlog.get_logger(__name__)

router = make_router(AdminRoute, tag="keys")

_KeyId = Annotated[str, Path(max_length=96, pattern=NO_NUL)]


@router.post("/admin/keys", status_code=201)
async def create_key(body: NewKey, request: Request, response: Response) -> CreatedKey:
    """Make a key. The answer holds the key itself, which cannot be read again."""
    services = services_of(request)
    principal = caller_of(request).principal
    principal.acting_for(body.tenant)
    principal.check_may_grant(body.models)
    create = partial(services.key_store.create, body, actor=principal.actor)
    text, key = await asyncio.to_thread(create)
    services.door.forget(key.id)
    log.info("key created", key_id=key.id, of_tenant=key.tenant, kind=key.kind)
    response.headers["Cache-Control"] = "no-store"
    return CreatedKey.of(key, key=text)


@router.get("/admin/keys")
async def list_keys(request: Request, tenant: AnyTenant) -> KeyList:
    """Every key, also those that were revoked, oldest first."""
    keys = await asyncio.to_thread(services_of(request).key_store.all, tenant)
    return KeyList(data=[KeyCard.of(key) for key in keys])


@router.delete("/admin/keys/{key_id}")
async def revoke_key(key_id: _KeyId, request: Request) -> KeyCard:
    """Revoke a key for good: at once in this process, within seconds in others."""
    services = services_of(request)
    principal = caller_of(request).principal
    tenant = None if principal.is_operator else principal.tenant
    revoke = partial(services.key_store.revoke, key_id, tenant, actor=principal.actor)
    key = await asyncio.to_thread(revoke)
    if key is None:
        raise HTTPException(404, explain("key_id", key_id, "the id of a key, as in the list"))
    services.door.forget(key.id)
    log.info("key revoked", key_id=key.id, of_tenant=key.tenant)
    return KeyCard.of(key)

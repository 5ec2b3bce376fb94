"""``GET /admin/audit``: who did what."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

from fastapi import Query, Request

from server.protocol.models import AuditCard, AuditList
from server.registry.versions import TENANT_PATTERN
from server.routes.guards import AdminRoute, make_router
from server.routes.listing import NO_NUL
from server.services import services_of

router = make_router(AdminRoute, tag="admin")

_DEFAULT_LIMIT = 100


@router.get("/admin/audit")
async def list_audit(
    request: Request,
    before: Annotated[
        int | None, Query(ge=1, le=2**62, description="of those before an id")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = _DEFAULT_LIMIT,
    tenant: Annotated[str | None, Query(pattern=TENANT_PATTERN)] = None,
    name: Annotated[str | None, Query(max_length=256, pattern=NO_NUL)] = None,
) -> AuditList:
    """Changes of adapters and keys, newest first. The next page is that before the last id."""
    registry = services_of(request).registry
    read = partial(registry.audit, limit=limit + 1, before=before, tenant=tenant, name=name)
    found = await asyncio.to_thread(read)
    cards = [AuditCard.model_validate(entry, from_attributes=True) for entry in found[:limit]]
    return AuditList(data=cards, has_more=len(found) > limit)

"""Whose names a request to ``/admin`` is about, and who makes it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from server.registry.versions import TENANT_PATTERN
from server.routes.guards import caller_of
from server.services import services_of

_Asked = Annotated[
    str | None,
    Query(
        pattern=TENANT_PATTERN,
        description="whose it is; empty: shared by all; default: the key's. Only an admin key of "
        "no tenant may name another's",
    ),
]
_AskedOrAll = Annotated[
    str | None,
    Query(
        pattern=TENANT_PATTERN,
        description="only of this tenant; default: all that the key may see",
    ),
]


def _acting_for(request: Request, tenant: _Asked = None) -> str:
    """The tenant that a request is about. Raises :class:`PermissionDenied`."""
    return caller_of(request).principal.acting_for(tenant)


def _looking_at(request: Request, tenant: _AskedOrAll = None) -> str | None:
    """The tenant that a list is about, None for all. Raises :class:`PermissionDenied`."""
    principal = caller_of(request).principal
    if tenant is None and principal.is_operator:
        return None
    return principal.acting_for(tenant)


Tenant = Annotated[str, Depends(_acting_for)]
AnyTenant = Annotated[str | None, Depends(_looking_at)]


def users_of(request: Request, digest: str) -> int | None:
    """Requests that use an adapter now, for operators alone: tenants with the same bytes share
    one, and must not see each other's use. None otherwise, or if it is not in the engine."""
    if not caller_of(request).principal.is_operator:
        return None
    return services_of(request).residency.num_users(digest)


def actor_of(request: Request) -> str:
    """Who makes a request, for the audit log."""
    return caller_of(request).principal.actor

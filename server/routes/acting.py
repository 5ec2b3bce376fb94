"""Whose names a request to ``/admin`` is about, and who makes it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request

from server.registry import SHARED
from server.registry.versions import TENANT_PATTERN

Tenant = Annotated[
    str, Query(pattern=TENANT_PATTERN, description="whose name it is; empty: shared by all")
]

__all__ = ["SHARED", "Tenant", "actor_of"]


def actor_of(request: Request) -> str:
    """Who makes a request, for the audit log."""
    return "admin"

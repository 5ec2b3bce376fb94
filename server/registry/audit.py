"""Who did what: rows that are written with the change they tell of, and never changed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, insert, select

from server.database import reading
from server.registry.tables import audit


@dataclass(frozen=True)
class AuditEntry:
    """One change that somebody made."""

    id: int
    """Counts up, perhaps with gaps."""
    at: int
    """Seconds since 1970, UTC."""
    actor: str
    """Name of the key; empty for the operator's own files and commands."""
    tenant: str
    action: str
    name: str
    """What it was done to, such as an adapter."""
    number: int | None
    """The version, where it was one."""
    digest: str | None
    detail: str


def record(
    connection: Connection,
    action: str,
    *,
    actor: str,
    tenant: str = "",
    name: str = "",
    number: int | None = None,
    digest: str | None = None,
    detail: str = "",
) -> None:
    """Note what this transaction does. It is there if and only if the change is."""
    entry = insert(audit).values(
        at=int(time.time()),
        actor=actor,
        tenant=tenant,
        action=action,
        name=name,
        number=number,
        digest=digest,
        detail=detail,
    )
    connection.execute(entry)


def read_audit(
    engine: Engine,
    *,
    limit: int,
    before: int | None = None,
    tenant: str | None = None,
    name: str | None = None,
) -> list[AuditEntry]:
    """At most ``limit`` entries, newest first: ``before`` an id, of a tenant, of a name."""
    query = select(*audit.c).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    if tenant is not None:
        query = query.where(audit.c.tenant == tenant)
    if name is not None:
        query = query.where(audit.c.name == name)
    with reading(engine) as connection:
        return [AuditEntry(**row._mapping) for row in connection.execute(query)]

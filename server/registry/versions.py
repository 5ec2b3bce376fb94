"""A version of an adapter, and the queries that find some."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, exists, or_, select

from reft_core.errors import InvalidRequest
from reft_core.spec import NAME_PATTERN, AdapterSpec
from server.registry.tables import names, versions

SHARED = ""
"""The tenant whose names everybody may use."""
TENANT_PATTERN = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"


@dataclass(frozen=True)
class Version:
    """One immutable version of a name."""

    name: str
    number: int
    digest: str
    num_bytes: int
    created_at: int
    """Seconds since 1970, UTC."""
    spec: AdapterSpec
    tenant: str = SHARED

    @property
    def resident_bytes(self) -> int:
        """Bytes it takes in memory once it is loaded."""
        return self.spec.resident_bytes(self.num_bytes)

    @property
    def reference(self) -> str:
        """A ``model`` value that means exactly these bytes, whatever becomes current."""
        return f"{self.name}@sha256:{self.digest[:12]}"


def is_name(name: str) -> bool:
    """Whether an adapter may have this name. Others are never looked up."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def check_name(name: str) -> None:
    """Raise :class:`InvalidRequest` unless an adapter may have this name."""
    if not is_name(name):
        raise InvalidRequest.because("name", name, f"a name matching {NAME_PATTERN}")


def check_tenant(tenant: str) -> None:
    """Raise :class:`InvalidRequest` unless a tenant may be called so, or it is everybody."""
    if re.fullmatch(TENANT_PATTERN, tenant) is None:
        raise InvalidRequest.because("tenant", tenant, f"a name matching {TENANT_PATTERN}")


def query() -> Select[Any]:
    """Query of versions; conditions to be added."""
    return select(*versions.c)


def of_name(tenant: str, name: str) -> Select[Any]:
    """Query of the versions of a tenant's own name, oldest first."""
    own = query().where(versions.c.tenant == tenant, versions.c.name == name)
    return own.order_by(versions.c.number)


def current() -> Select[Any]:
    """Query of versions that are current."""
    return query().join(
        names,
        and_(
            names.c.tenant == versions.c.tenant,
            names.c.name == versions.c.name,
            names.c.current == versions.c.number,
        ),
    )


def visible(tenant: str) -> Any:
    """Condition on names: a tenant's own that are alive, and shared ones they do not hide."""
    alive = names.c.current.is_not(None)
    if tenant == SHARED:
        return and_(alive, names.c.tenant == SHARED)
    own = names.alias("own")
    hidden = exists().where(
        own.c.tenant == tenant, own.c.name == names.c.name, own.c.current.is_not(None)
    )
    shared = and_(names.c.tenant == SHARED, ~hidden)
    return and_(alive, or_(names.c.tenant == tenant, shared))


def find(connection: Connection, wanted: Select[Any]) -> Version | None:
    """The first version that a query finds, if it does."""
    row = connection.execute(wanted.limit(1)).one_or_none()
    return None if row is None else _to_version(row)


def find_all(connection: Connection, wanted: Select[Any]) -> list[Version]:
    """Every version that a query finds."""
    return [_to_version(row) for row in connection.execute(wanted)]


_parse_spec = lru_cache(maxsize=4096)(AdapterSpec.model_validate_json)


def _to_version(row: Row[Any]) -> Version:
    """The version in a row of the versions table."""
    spec = _parse_spec(row.spec)
    return Version(
        row.name, row.number, row.digest, row.num_bytes, row.created_at, spec, row.tenant
    )

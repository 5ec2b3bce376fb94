"""The catalog: which names exist, their immutable versions, and which one is current.

A version number is never used twice, not even after its name was deleted, so ``name@3``
either means what it always meant or nothing. Nothing is remembered between two calls: what
another server changed is seen by the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, Select, and_, delete, exists, or_, select

from server.database import open_database, reading, sqlite_url, writing
from server.registry import versions as of
from server.registry.changes import NameChange, hold_files, refers_to
from server.registry.tables import names, trash, versions
from server.registry.versions import SHARED, Version, find, find_all, visible


@dataclass(frozen=True)
class Filter:
    """Which current versions a list has. What is empty or None admits all."""

    prefix: str = ""
    """Names that begin so."""
    method: str | None = None
    base: str | None = None
    """Name of the base model in the adapter's spec."""
    tenant: str | None = None


class NameState(NamedTuple):
    """What a name means now."""

    current: int | None
    """None once it is deleted."""
    previous: int | None
    pinned: bool


class Catalog:
    """Names and versions in a database. Thread-safe; every change is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def in_file(cls, path: Path) -> Catalog:
        """The catalog in an SQLite file, made if new."""
        return cls(open_database(sqlite_url(path)))

    def close(self) -> None:
        """Close every connection. The catalog cannot be used afterwards."""
        self.engine.dispose()

    @contextmanager
    def changing(self, tenant: str, name: str, actor: str) -> Iterator[NameChange]:
        """A transaction that changes one name; nobody else changes it meanwhile."""
        with writing(self.engine) as connection:
            yield NameChange(connection, tenant, name, actor)

    def current(self, name: str, tenant: str = SHARED) -> Version | None:
        """The version that a bare ``name`` means to a tenant: its own, or else the shared one."""
        wanted = of.current().where(names.c.name == name, names.c.tenant.in_([tenant, SHARED]))
        return self._find(wanted.order_by(names.c.tenant.desc()))  # "" is last

    def numbered(self, name: str, number: int, tenant: str = SHARED) -> Version | None:
        """The version ``name@number``.

        A name that a tenant ever had is its own here, also after it was deleted: a number must
        not come to mean the shared version instead.
        """
        own = exists().where(names.c.tenant == tenant, names.c.name == name)
        wanted = of.query().where(
            versions.c.name == name,
            versions.c.number == number,
            or_(versions.c.tenant == tenant, and_(versions.c.tenant == SHARED, ~own)),
        )
        return self._find(wanted)

    def with_digest(self, name: str, prefix: str, tenant: str = SHARED) -> list[Version]:
        """Versions of ``name`` whose digest starts with ``prefix`` (hex digits), own ones first.

        Bytes that are in both an own and a shared version are there once.
        """
        wanted = of.query().where(
            versions.c.name == name,
            versions.c.tenant.in_([tenant, SHARED]),
            versions.c.digest.startswith(prefix),
        )
        with reading(self.engine) as connection:
            found = find_all(connection, wanted.order_by(versions.c.tenant, versions.c.number))
        return list({version.digest: version for version in found}.values())  # the last, own ones

    def versions(self, name: str, tenant: str = SHARED) -> list[Version]:
        """All versions of ``name``, oldest first: the tenant's own, or else the shared ones."""
        with reading(self.engine) as connection:
            own = find_all(connection, of.of_name(tenant, name))
            return own or find_all(connection, of.of_name(SHARED, name))

    def state(self, tenant: str, name: str) -> NameState | None:
        """What a tenant's own name means, if it ever had it."""
        wanted = select(names.c.current, names.c.previous, names.c.pinned)
        with reading(self.engine) as connection:
            its = connection.execute(wanted.where(names.c.tenant == tenant, names.c.name == name))
            row = its.one_or_none()
            return None if row is None else NameState(*row)

    def exact(self, tenant: str, name: str, digest: str) -> tuple[Version, bool] | None:
        """A tenant's own version of these bytes, and whether it is current."""
        with reading(self.engine) as connection:
            wanted = of.of_name(tenant, name).where(versions.c.digest == digest)
            version = find(connection, wanted)
            if version is None:
                return None
            its = select(names.c.current).where(names.c.tenant == tenant, names.c.name == name)
            return version, connection.scalar(its) == version.number

    def all_current(
        self, after: str = "", limit: int | None = None, tenant: str = SHARED
    ) -> list[Version]:
        """What every name that a tenant sees means now, by name.

        Of those ``after`` one, up to ``limit``.
        """
        wanted = of.current().where(visible(tenant), names.c.name > after)
        with reading(self.engine) as connection:
            return find_all(connection, wanted.order_by(names.c.name).limit(limit))

    def page(
        self,
        admit: Filter,
        after: str = "",
        after_tenant: str | None = None,
        limit: int | None = None,
    ) -> list[Version]:
        """Current versions that the filter admits, by name and then tenant.

        Of those after ``after``, or after ``after_tenant``'s name ``after``; up to ``limit``.
        """
        later = names.c.name > after
        if after_tenant is not None:
            later = or_(later, and_(names.c.name == after, names.c.tenant > after_tenant))
        wanted = of.current().where(later, names.c.name.startswith(admit.prefix, autoescape=True))
        if admit.method is not None:
            wanted = wanted.where(versions.c.method == admit.method)
        if admit.base is not None:
            wanted = wanted.where(versions.c.base == admit.base)
        if admit.tenant is not None:
            wanted = wanted.where(names.c.tenant == admit.tenant)
        with reading(self.engine) as connection:
            ordered = wanted.order_by(names.c.name, names.c.tenant)
            return find_all(connection, ordered.limit(limit))

    def names(self, limit: int, tenant: str = SHARED) -> list[str]:
        """The first ``limit`` names that a tenant sees, in order."""
        first = select(names.c.name).where(visible(tenant)).order_by(names.c.name).limit(limit)
        with reading(self.engine) as connection:
            return list(connection.scalars(first))

    def pinned(self) -> list[Version]:
        """What the names mean that are to stay loaded."""
        with reading(self.engine) as connection:
            return find_all(connection, of.current().where(names.c.pinned))

    def digests(self) -> set[str]:
        """Every digest that some version refers to."""
        with reading(self.engine) as connection:
            return set(connection.scalars(select(versions.c.digest)))

    def trash(self, older_than_s: float = 0.0) -> list[str]:
        """Digests of files that were marked for removal so long ago."""
        due = select(trash.c.digest).where(trash.c.since <= time.time() - older_than_s)
        with reading(self.engine) as connection:
            return list(connection.scalars(due))

    @contextmanager
    def removing(self, digest: str) -> Iterator[bool]:
        """A transaction in which a file may be removed, if what it yields is True.

        Nobody stores or refers to it meanwhile. It is no longer marked for removal afterwards.
        """
        with writing(self.engine) as connection:
            hold_files(connection, [digest])
            yield not refers_to(connection, digest)
            connection.execute(delete(trash).where(trash.c.digest == digest))

    def _find(self, wanted: Select[Any]) -> Version | None:
        """The first version that a query finds, if it does."""
        with reading(self.engine) as connection:
            return find(connection, wanted)

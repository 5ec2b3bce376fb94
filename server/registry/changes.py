"""What one transaction changes about one name. Every change is in the audit log with it.

Locks are taken in one order, so that two changes never wait for each other: first the name's,
then those of files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, insert, select, update

from reft_core.errors import AdapterConflict, explain
from reft_core.spec import AdapterSpec
from server.database import lock
from server.registry.audit import record
from server.registry.tables import names, trash, versions
from server.registry.versions import Version, find, find_all, of_name


@dataclass(frozen=True)
class Deleted:
    """Outcome of a delete: what is gone, and the digests nothing refers to any more."""

    versions: list[Version]
    orphaned: list[str]


class NameChange:
    """A tenant's name, held from the start of a transaction to its end."""

    def __init__(self, connection: Connection, tenant: str, name: str, actor: str) -> None:
        self._connection = connection
        self._tenant = tenant
        self._name = name
        self._actor = actor
        self._is_it = (names.c.tenant == tenant) & (names.c.name == name)
        lock(connection, f"name:{tenant}/{name}")

    def hold_file(self, *digests: str) -> None:
        """Keep others from storing or removing the files of ``digests`` until the end."""
        hold_files(self._connection, digests)

    def add(self, digest: str, num_bytes: int, spec: AdapterSpec) -> tuple[Version, bool]:
        """Make ``digest`` current; True if the version is new. Its file must be held and stored."""
        self._connection.execute(delete(trash).where(trash.c.digest == digest))
        held = self._row()
        known = find(self._connection, self._versions().where(versions.c.digest == digest))
        if held is not None and known is not None:
            if held.current != known.number:
                self._set_current(known.number, held.current)
                self._record("promote", known)
            return known, False
        number = 1 if held is None else held.last_number + 1
        version = Version(
            self._name, number, digest, num_bytes, int(time.time()), spec, self._tenant
        )
        if held is None:
            self._connection.execute(
                insert(names).values(
                    tenant=self._tenant, name=self._name, last_number=0, pinned=False
                )
            )
        self._connection.execute(
            insert(versions).values(
                tenant=self._tenant,
                name=self._name,
                number=number,
                digest=digest,
                num_bytes=num_bytes,
                created_at=version.created_at,
                method=spec.method,
                base=spec.base.name,
                spec=spec.to_json(),
            )
        )
        self._connection.execute(update(names).where(self._is_it).values(last_number=number))
        self._set_current(number, None if held is None else held.current)
        self._record("upload", version)
        return version, True

    def promote(self, number: int) -> Version | None:
        """Make version ``number`` current; None if there is none."""
        version = self._numbered(number)
        held = self._row()
        if version is None or held is None:
            return None
        if held.current != number:
            self._set_current(number, held.current)
            self._record("promote", version)
        return version

    def roll_back(self) -> Version | None:
        """Make current what was before; None without such a name.

        Raises :class:`AdapterConflict` if nothing was. To roll back twice is to come back.
        """
        held = self._row()
        if held is None or held.current is None:
            return None
        version = None if held.previous is None else self._numbered(held.previous)
        if version is None:
            raise AdapterConflict(
                explain("name", self._name, "one that had another current version before"),
                field="name",
            )
        self._set_current(version.number, held.current)
        self._record("rollback", version)
        return version

    def pin(self, pinned: bool) -> Version | None:
        """Keep the name loaded from now on, or no more; None if there is none."""
        held = self._row()
        if held is None or held.current is None:
            return None
        version = self._numbered(held.current)
        assert version is not None, "a current version exists"
        if held.pinned != pinned:
            self._connection.execute(update(names).where(self._is_it).values(pinned=pinned))
            self._record("pin" if pinned else "unpin", version)
        return version

    def remove(self) -> Deleted | None:
        """Delete the name with all its versions; None if there is none."""
        removed = find_all(self._connection, self._versions())
        if not removed:
            return None
        self._connection.execute(
            delete(versions).where(versions.c.tenant == self._tenant, versions.c.name == self._name)
        )
        gone = update(names).where(self._is_it)
        self._connection.execute(gone.values(current=None, previous=None, pinned=False))
        for version in removed:
            self._record("delete", version)
        return Deleted(removed, self._discard(version.digest for version in removed))

    def remove_number(self, number: int) -> Deleted | None:
        """Delete one version; with the last one goes the name. None if there is none.

        Raises :class:`AdapterConflict` for the current one of several.
        """
        held, version = self._row(), self._numbered(number)
        if held is None or version is None:
            return None
        if len(find_all(self._connection, self._versions().limit(2))) == 1:
            return self.remove()
        if held.current == number:
            raise AdapterConflict(
                explain("version", number, "one that is not current; promote another first"),
                field="version",
            )
        self._connection.execute(
            delete(versions).where(
                versions.c.tenant == self._tenant,
                versions.c.name == self._name,
                versions.c.number == number,
            )
        )
        if held.previous == number:
            self._connection.execute(update(names).where(self._is_it).values(previous=None))
        self._record("delete", version)
        return Deleted([version], self._discard([version.digest]))

    def _discard(self, digests: Iterable[str]) -> list[str]:
        """Mark files for removal that no version has any more, and return their digests."""
        candidates = sorted(set(digests))
        self.hold_file(*candidates)
        orphaned = [each for each in candidates if not refers_to(self._connection, each)]
        for digest in orphaned:
            self._connection.execute(delete(trash).where(trash.c.digest == digest))
            self._connection.execute(insert(trash).values(digest=digest, since=int(time.time())))
        return orphaned

    def _set_current(self, number: int, previous: int | None) -> None:
        """Point the name at one of its versions, and remember where it pointed."""
        self._connection.execute(
            update(names).where(self._is_it).values(current=number, previous=previous)
        )

    def _row(self) -> Row[Any] | None:
        """The name's row; a deleted name has one, too."""
        return self._connection.execute(select(names).where(self._is_it)).one_or_none()

    def _versions(self) -> Any:
        """Query of the name's versions, oldest first."""
        return of_name(self._tenant, self._name)

    def _numbered(self, number: int) -> Version | None:
        """One of the name's versions."""
        return find(self._connection, self._versions().where(versions.c.number == number))

    def _record(self, action: str, version: Version) -> None:
        """Note what was done to a version."""
        record(
            self._connection,
            action,
            actor=self._actor,
            tenant=self._tenant,
            name=self._name,
            number=version.number,
            digest=version.digest,
        )


def hold_files(connection: Connection, digests: Iterable[str]) -> None:
    """Keep other transactions from storing or removing files until this one ends."""
    lock(connection, *(f"blob:{digest}" for digest in digests))


def refers_to(connection: Connection, digest: str) -> bool:
    """Whether any version of any name has this digest."""
    return bool(connection.scalar(select(exists().where(versions.c.digest == digest))))

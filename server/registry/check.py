"""Compares catalog and store with each other, and repairs what can be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import select, update

from reft_core.errors import AdapterNotFound, RequestFailed
from server.database import reading, writing
from server.registry.audit import record
from server.registry.blobs import BlobStore, FolderBlobs
from server.registry.catalog import Catalog
from server.registry.changes import NameChange
from server.registry.incoming import abandoned
from server.registry.tables import names, versions

Kind = Literal[
    "missing file", "damaged file", "stray file", "temporary file", "foreign file", "bad current"
]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    kind: Kind
    what: str
    repair: str
    """What repairing it means, or meant."""


class RegistryCheck:
    """Every row of the catalog has its file, with the right digest, and nothing else is there.

    Of use beside running servers: a file is looked at and removed while nobody may store it, and
    an upload that still arrives is known from one whose process died. Files in the trash are
    neither missing nor stray: the servers remove them when their time has come.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self.num_versions = 0
        """Versions that were compared with their files."""

    def run(self, *, repair: bool) -> Iterator[Finding]:
        """What is wrong, each repaired before it is told if that is asked for."""
        yield from self._versions(repair)
        yield from self._currents(repair)
        yield from self._files(repair)

    def _versions(self, repair: bool) -> Iterator[Finding]:
        """Versions whose file is missing or damaged. No repair brings one back."""
        wanted = select(versions.c.tenant, versions.c.name, versions.c.number, versions.c.digest)
        with reading(self._catalog.engine) as connection:
            rows = connection.execute(wanted.order_by(versions.c.digest)).all()
        faults: dict[str, Kind | None] = {}
        for tenant, name, number, digest in rows:
            self.num_versions += 1
            if digest not in faults:
                faults[digest] = self._fault_of(digest)
            kind = faults[digest]
            if kind is None or not self._still_there(tenant, name, number):
                continue
            if repair:
                with self._catalog.changing(tenant, name, "registry check") as change:
                    _remove_version(change, number)
            what = f"{tenant + '/' if tenant else ''}{name}@{number} (sha256:{digest})"
            yield Finding(kind, what, "the version is deleted; upload the file again")

    def _fault_of(self, digest: str) -> Kind | None:
        """What is wrong with a file, past any cache of it."""
        try:
            self._blobs.get_stored(digest)
        except AdapterNotFound:
            return "missing file"
        except RequestFailed:
            return "damaged file"
        return None

    def _still_there(self, tenant: str, name: str, number: int) -> bool:
        """Whether a version was not deleted while its file was looked for."""
        wanted = select(versions.c.number).where(
            versions.c.tenant == tenant, versions.c.name == name, versions.c.number == number
        )
        with reading(self._catalog.engine) as connection:
            return connection.scalar(wanted) is not None

    def _currents(self, repair: bool) -> Iterator[Finding]:
        """Names that point at a version they do not have, or at none though they have some."""
        with reading(self._catalog.engine) as connection:
            rows = connection.execute(select(names)).all()
            numbers: dict[tuple[str, str], set[int]] = {}
            for tenant, name, number in connection.execute(
                select(versions.c.tenant, versions.c.name, versions.c.number)
            ):
                numbers.setdefault((tenant, name), set()).add(number)
        for row in rows:
            has = numbers.get((row.tenant, row.name), set())
            right = row.current if row.current in has else max(has, default=None)
            if row.current == right and row.last_number >= max(has, default=0):
                continue
            if repair:
                with writing(self._catalog.engine) as connection:
                    connection.execute(
                        update(names)
                        .where(names.c.tenant == row.tenant, names.c.name == row.name)
                        .values(current=right, last_number=max(row.last_number, *has, 0))
                    )
                    record(
                        connection,
                        "repair",
                        actor="registry check",
                        tenant=row.tenant,
                        name=row.name,
                        number=right,
                    )
            what = f"{row.name}: current is {row.current}, of versions {sorted(has)}"
            yield Finding("bad current", what, f"current becomes {right}")

    def _files(self, repair: bool) -> Iterator[Finding]:
        """Files that no version has, and what uploads left whose process died."""
        for digest in self._blobs.digests():
            if self._catalog.knows(digest):
                continue
            with self._catalog.removing(digest) if repair else nullcontext(True) as orphaned:
                if repair and orphaned:
                    self._blobs.remove(digest)
            if orphaned:
                yield Finding("stray file", f"sha256:{digest}", "removed")
        for path in abandoned(self._blobs.temporary):
            if repair:
                path.unlink(missing_ok=True)
            yield Finding("temporary file", str(path), "removed")
        for stranger in self._blobs.strangers():
            is_ours = isinstance(self._blobs, FolderBlobs) and ".tmp-" in stranger
            if is_ours and repair:
                Path(stranger).unlink(missing_ok=True)
            kind: Kind = "temporary file" if is_ours else "foreign file"
            yield Finding(kind, os.fspath(stranger), "removed" if is_ours else "left alone")


def _remove_version(change: NameChange, number: int) -> None:
    """Delete a version that has no file; if it is current, what was before becomes current."""
    change.step_down(number)
    change.remove_number(number)

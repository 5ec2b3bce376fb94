"""The registry: what may be uploaded, and what a ``model`` value means.

Crash safety is an order: a file is stored before the catalog mentions it, and the catalog
forgets a version before its file goes. A crash in between leaves an unmentioned file,
which is swept up later, and never a version without a file.

Names belong to tenants. Whoever looks a name up gets the tenant's own, or else the one shared by
all; whoever changes one changes that tenant's own alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine

from reft_core.adapter import check_fits, decode_adapter
from reft_core.errors import (
    AdapterConflict,
    AdapterNotFound,
    InvalidRequest,
    explain,
)
from reft_core.sites import ModelDescription
from reft_core.threads import run_in_own_thread
from server.database import sqlite_url
from server.registry.audit import AuditEntry, read_audit
from server.registry.blobs import BlobStore, FolderBlobs, sweep_temporary
from server.registry.catalog import Catalog, Filter
from server.registry.changes import Deleted, NameChange
from server.registry.incoming import Incoming
from server.registry.references import MIN_DIGEST_PREFIX, parse_reference
from server.registry.signing import SignatureCheck
from server.registry.versions import SHARED, Version, check_name, check_tenant, is_name

_MAX_NAMES_SHOWN = 20
T = TypeVar("T")


@dataclass(frozen=True)
class Uploaded:
    """Outcome of an upload: the version that is now current, and whether it is new."""

    version: Version
    created: bool


@dataclass(frozen=True)
class Inspected:
    """A version that somebody named, and what there is to know about its name."""

    version: Version
    versions: list[Version]
    """All of the name, oldest first."""
    current: int
    previous: int | None
    pinned: bool


class Registry:
    """Adapters by name, for one base model. Thread-safe; blocks on disk, database and store."""

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        model: ModelDescription,
        max_bytes: int,
        signatures: SignatureCheck | None = None,
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._model = model
        self._max_bytes = max_bytes
        self._signatures = signatures or SignatureCheck("off", None)

    @classmethod
    def open(
        cls,
        folder: Path,
        model: ModelDescription,
        max_bytes: int,
        *,
        database: str | None = None,
        blobs: BlobStore | None = None,
        signatures: SignatureCheck | None = None,
    ) -> Registry:
        """The registry kept in ``folder``, unless its database (by URL) or files are elsewhere.

        Made if new, cleared of what uploads left whose process died.
        """
        catalog = Catalog.at(database or sqlite_url(folder / "catalog.sqlite"))
        try:
            blobs = blobs or FolderBlobs(folder / "blobs")
            sweep_temporary(blobs)
            registry = cls(catalog, blobs, model, max_bytes, signatures)
            if isinstance(blobs, FolderBlobs):  # to list a remote store takes long
                registry.sweep()
        except BaseException:
            catalog.close()
            raise
        return registry

    def close(self) -> None:
        """Release the catalog's connections."""
        self._catalog.close()

    @property
    def base_name(self) -> str:
        """What requests call the base model."""
        return self._model.name

    @property
    def engine(self) -> Engine:
        """The database, for other parts that have tables of their own in it."""
        return self._catalog.engine

    def incoming(self) -> Incoming:
        """A temporary file for an upload; to be closed, whatever becomes of it."""
        return Incoming(self._blobs.temporary)

    def upload(
        self,
        name: str,
        data: bytes,
        *,
        tenant: str = SHARED,
        actor: str = "",
        expected_digest: str | None = None,
    ) -> Uploaded:
        """Make the adapter file ``data`` what ``name`` means from now on.

        The same bytes under the same name are one version, however often they are sent. On
        return the version is on disk. Raises :class:`InvalidRequest` (bad name, tenant or
        digest), :class:`AdapterConflict` (the base model's name), :class:`AdapterFileInvalid`,
        :class:`AdapterMismatch`, and what database and store raise; then nothing is stored.
        """
        digest = hashlib.sha256(data).hexdigest()
        self._check_upload(name, tenant, digest, expected_digest)
        known = self._current_if(tenant, name, digest)
        if known is not None:
            return Uploaded(known, created=False)  # nothing is written, not even a temporary file
        with self.incoming() as file:
            file.write(data)
            return self.upload_file(name, file, tenant=tenant, actor=actor)

    def upload_file(
        self,
        name: str,
        file: Incoming,
        *,
        tenant: str = SHARED,
        actor: str = "",
        expected_digest: str | None = None,
    ) -> Uploaded:
        """:meth:`upload` of what has arrived in a temporary file."""
        digest = file.digest
        self._check_upload(name, tenant, digest, expected_digest)
        known = self._current_if(tenant, name, digest)
        if known is not None:
            return Uploaded(known, created=False)
        adapter = run_in_own_thread(lambda: decode_adapter(file.read(), max_bytes=self._max_bytes))
        check_fits(adapter.spec, self._model)
        with self._catalog.changing(tenant, name, actor) as change:
            change.hold_file(digest)
            self._blobs.put(file)
            version, created = change.add(digest, file.num_bytes, adapter.spec)
        return Uploaded(version, created)

    def check_signature(self, file: Incoming, signature: str | None) -> None:
        """Raise :class:`SignatureInvalid` unless an upload from outside may be stored.

        Files that the operator registers need no signature.
        """
        self._signatures.check(file, signature)

    def delete(self, name: str, *, tenant: str = SHARED, actor: str = "") -> Deleted:
        """Delete ``name`` with every version. Raises :class:`AdapterNotFound`.

        Their files go by a later :meth:`collect`, if no other name has them.
        """
        return self._change(name, tenant, actor, lambda change: change.remove())

    def delete_version(
        self, name: str, number: int, *, tenant: str = SHARED, actor: str = ""
    ) -> Deleted:
        """Delete one version, and with the last one the name. Raises :class:`AdapterNotFound`,
        and :class:`AdapterConflict` for the current one of several.
        """
        return self._change(
            name, tenant, actor, lambda change: change.remove_number(number), number
        )

    def promote(self, name: str, number: int, *, tenant: str = SHARED, actor: str = "") -> Version:
        """Make version ``number`` what ``name`` means. Raises :class:`AdapterNotFound`."""
        return self._change(name, tenant, actor, lambda change: change.promote(number), number)

    def roll_back(self, name: str, *, tenant: str = SHARED, actor: str = "") -> Version:
        """Make current again what was before. Raises :class:`AdapterNotFound`, and
        :class:`AdapterConflict` if nothing was.
        """
        return self._change(name, tenant, actor, lambda change: change.roll_back())

    def pin(self, name: str, pinned: bool, *, tenant: str = SHARED, actor: str = "") -> Version:
        """Keep ``name`` loaded from now on, or no more. Raises :class:`AdapterNotFound`."""
        return self._change(name, tenant, actor, lambda change: change.pin(pinned))

    def collect(self, older_than_s: float = 0.0, keep: Collection[str] = ()) -> list[str]:
        """Remove the files of versions deleted so long ago, but those to keep; their digests."""
        due = [each for each in self._catalog.trash(older_than_s) if each not in keep]
        return [digest for digest in due if self._remove_file(digest)]

    def sweep(self) -> list[str]:
        """Remove files that no version has and that are not in the trash; their digests.

        A process that died between storing a file and recording it has left them. Lists all files.
        """
        keep = self._catalog.digests() | set(self._catalog.trash())
        strays = [digest for digest in self._blobs.digests() if digest not in keep]
        return [digest for digest in strays if self._remove_file(digest)]

    def trash(self) -> list[str]:
        """Digests of files that are to be removed."""
        return self._catalog.trash()

    def read(self, digest: str) -> bytes:
        """The verified bytes of a stored adapter file; see :meth:`BlobStore.get`."""
        return self._blobs.get(digest)

    def versions(self, name: str, tenant: str = SHARED) -> list[Version]:
        """Every version of ``name``, oldest first. Raises :class:`AdapterNotFound`."""
        versions = self._catalog.versions(name, tenant) if is_name(name) else []
        if not versions:
            raise self._not_found(name, tenant)
        return versions

    def current(self, name: str, tenant: str = SHARED) -> Version:
        """The version ``name`` means now. Raises :class:`AdapterNotFound`."""
        version = self._catalog.current(name, tenant) if is_name(name) else None
        if version is None:
            raise self._not_found(name, tenant)
        return version

    def stored(self, model: str, tenant: str = SHARED) -> Version:
        """:meth:`resolve` of what must be an adapter."""
        version = self.resolve(model, tenant)
        if version is None:
            raise self._not_found(model, tenant)
        return version

    def inspect(self, model: str, tenant: str = SHARED) -> Inspected:
        """A version by any form of its name, and its name. Raises :class:`AdapterNotFound`."""
        version = self.stored(model, tenant)
        state = self._catalog.state(version.tenant, version.name)
        versions = self._catalog.versions(version.name, version.tenant)
        if state is None or state.current is None:
            raise self._not_found(model, tenant)  # deleted in between
        return Inspected(version, versions, state.current, state.previous, state.pinned)

    def all_current(
        self, after: str = "", limit: int | None = None, tenant: str = SHARED
    ) -> list[Version]:
        """What every name that a tenant sees means now; see :meth:`Catalog.all_current`."""
        return self._catalog.all_current(after, limit, tenant)

    def page(
        self,
        admit: Filter,
        after: str = "",
        after_tenant: str | None = None,
        limit: int | None = None,
    ) -> list[Version]:
        """Current versions of all tenants that a filter admits; see :meth:`Catalog.page`."""
        return self._catalog.page(admit, after, after_tenant, limit)

    def to_keep(self, names: Iterable[str]) -> list[Version]:
        """What names mean now that were pinned, and these shared ones, as far as they exist."""
        found = [self._catalog.current(name) for name in sorted(names)]
        kept = [version for version in found if version is not None]
        ids = {(version.tenant, version.name) for version in kept}
        pinned = self._catalog.pinned()
        return kept + [each for each in pinned if (each.tenant, each.name) not in ids]

    def audit(self, **conditions: Any) -> list[AuditEntry]:
        """Who did what; see :func:`read_audit`."""
        return read_audit(self.engine, **conditions)

    def resolve(self, model: str, tenant: str = SHARED) -> Version | None:
        """What a request's ``model`` means: an adapter version, or None for the base model.

        Understands ``name``, ``name@3`` and ``name@sha256:<12 to 64 hex digits>``. Raises
        :class:`AdapterNotFound`.
        """
        if model == self._model.name:
            return None
        reference = parse_reference(model)
        if reference is None:
            raise self._not_found(model, tenant)
        name = reference.name
        if reference.number is not None:
            version = self._catalog.numbered(name, reference.number, tenant)
        elif reference.digest is not None:
            found = self._catalog.with_digest(name, reference.digest, tenant)
            version = found[0] if len(found) == 1 else None
        else:
            version = self._catalog.current(name, tenant)
        if version is None:
            raise self._not_found(model, tenant)
        return version

    def _change(
        self,
        name: str,
        tenant: str,
        actor: str,
        make: Callable[[NameChange], T | None],
        number: int | None = None,
    ) -> T:
        """Make a change of one name in a transaction. Raises :class:`AdapterNotFound` for None."""
        check_tenant(tenant)
        made = None
        if is_name(name):
            with self._catalog.changing(tenant, name, actor) as change:
                made = make(change)
        if made is None:
            raise self._not_found(name if number is None else f"{name}@{number}", tenant)
        return made

    def _check_upload(self, name: str, tenant: str, digest: str, expected: str | None) -> None:
        """Refuse an upload that no content could make right."""
        check_name(name)
        check_tenant(tenant)
        if name == self._model.name:
            raise AdapterConflict(
                explain("name", name, "a name other than the base model's"), field="name"
            )
        if expected is not None and digest != expected:
            raise InvalidRequest.because(
                "x-expected-sha256", expected, f"{digest}, which is that of the body"
            )

    def _current_if(self, tenant: str, name: str, digest: str) -> Version | None:
        """The current version if it has this digest, and its file is there."""
        known = self._catalog.exact(tenant, name, digest)
        if known is None or not known[1] or not self._blobs.holds(digest, known[0].num_bytes):
            return None
        return known[0]

    def _remove_file(self, digest: str) -> bool:
        """Remove a file unless some version has come to have it; whether it was removed."""
        with self._catalog.removing(digest) as orphaned:
            if orphaned:
                self._blobs.remove(digest)
            return orphaned

    def _not_found(self, model: str, tenant: str) -> AdapterNotFound:
        """The error for an unknown model, naming those there are, or a known one's versions."""
        reference = parse_reference(model)
        if reference is not None and reference.number is not None:
            numbers = [each.number for each in self._catalog.versions(reference.name, tenant)]
            if numbers and reference.number not in numbers:
                shown = [f"@{number}" for number in numbers[-_MAX_NAMES_SHOWN:]]
                allowed = f"a version of {reference.name} that is there: {', '.join(shown)}"
                return AdapterNotFound(explain("model", model, allowed), field="model")
        names = self._catalog.names(_MAX_NAMES_SHOWN + 1, tenant)
        known = ", ".join([f"{self._model.name} (base)", *names[:_MAX_NAMES_SHOWN]])
        more = " and others" if len(names) > _MAX_NAMES_SHOWN else ""
        return AdapterNotFound(
            explain("model", model, f"one of {known}{more}; optionally with @<version> or ")
            + f"@sha256:<{MIN_DIGEST_PREFIX} or more hex digits>",
            field="model",
        )

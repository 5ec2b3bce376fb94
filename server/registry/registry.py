"""The registry: what may be uploaded, and what a ``model`` value means.

Crash safety is an order: a file is stored before the catalog mentions it, and the catalog
forgets a version before its file goes. A crash in between leaves an unmentioned file,
which the next start sweeps up, and never a version without a file.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from reft_core.adapter import check_fits, decode_adapter
from reft_core.errors import AdapterConflict, AdapterNotFound, InvalidRequest, explain
from reft_core.sites import ModelDescription
from reft_core.spec import NAME_PATTERN
from reft_core.threads import run_in_own_thread
from server.registry.blobs import BlobStore
from server.registry.catalog import Catalog, Version

MIN_DIGEST_PREFIX = 12
_MAX_NAMES_SHOWN = 20
_SWEEP_AFTER_S = 3600.0
_REFERENCE = re.compile(
    r"(?P<name>[^@]+)@(?:(?P<number>[1-9]\d{0,8})|sha256:(?P<digest>[0-9a-f]{12,64}))"
)


@dataclass(frozen=True)
class Uploaded:
    """Outcome of an upload: the version that is now current, and whether it is new."""

    version: Version
    created: bool


@dataclass(frozen=True)
class Deleted:
    """Outcome of a delete: what is gone, and the digests nothing refers to any more."""

    versions: list[Version]
    orphaned: list[str]


class Registry:
    """Adapters by name, for one base model. Thread-safe; blocks on disk."""

    def __init__(
        self, catalog: Catalog, blobs: BlobStore, model: ModelDescription, max_bytes: int
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._model = model
        self._max_bytes = max_bytes
        # Holds apart an upload's store-then-record and a delete's forget-then-remove: of the
        # same bytes, their steps must not interleave.
        self._changing = threading.Lock()

    @classmethod
    def open(cls, folder: Path, model: ModelDescription, max_bytes: int) -> Registry:
        """The registry kept in ``folder``, made if new, cleared of a crash's leftovers."""
        blobs = BlobStore(folder / "blobs")
        catalog = Catalog(folder / "catalog.sqlite")
        blobs.sweep(catalog.digests(), older_than_s=_SWEEP_AFTER_S)
        return cls(catalog, blobs, model, max_bytes)

    def close(self) -> None:
        """Release the catalog's connections."""
        self._catalog.close()

    def upload(self, name: str, data: bytes) -> Uploaded:
        """Make the adapter file ``data`` what ``name`` means from now on.

        The same bytes under the same name are one version, however often they are sent.
        Raises :class:`InvalidRequest` (bad name), :class:`AdapterConflict` (the base model's
        name), :class:`AdapterFileInvalid`, :class:`AdapterMismatch`; then nothing is stored.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise InvalidRequest.because("name", name, f"a name matching {NAME_PATTERN}")
        if name == self._model.name:
            raise AdapterConflict(
                explain("name", name, "a name other than the base model's"), field="name"
            )
        adapter = run_in_own_thread(lambda: decode_adapter(data, max_bytes=self._max_bytes))
        check_fits(adapter.spec, self._model)
        with self._changing:
            digest = self._blobs.put(data)
            version, created = self._catalog.add(name, digest, len(data), adapter.spec)
        return Uploaded(version, created)

    def delete(self, name: str) -> Deleted:
        """Delete ``name`` with every version. Raises :class:`AdapterNotFound`."""
        with self._changing:
            versions = self._catalog.remove(name)
            if not versions:
                raise self._not_found(name)
            digests = [version.digest for version in versions]
            orphaned = [d for d in digests if not self._catalog.refers_to(d)]
            for digest in orphaned:
                self._blobs.remove(digest)
        return Deleted(versions, orphaned)

    def read(self, digest: str) -> bytes:
        """The verified bytes of a stored adapter file; see :meth:`BlobStore.get`."""
        return self._blobs.get(digest)

    def versions(self, name: str) -> list[Version]:
        """Every version of ``name``, oldest first. Raises :class:`AdapterNotFound`."""
        versions = self._catalog.versions(name)
        if not versions:
            raise self._not_found(name)
        return versions

    def current(self, name: str) -> Version:
        """The version ``name`` means now. Raises :class:`AdapterNotFound`."""
        version = self._catalog.current(name)
        if version is None:
            raise self._not_found(name)
        return version

    def all_current(
        self, after: str = "", limit: int | None = None, *, tenant: str = ""
    ) -> list[Version]:
        """The current version of every name, by name: of those ``after`` one, up to ``limit``."""
        return self._catalog.all_current(after, limit)

    def resolve(self, model: str, *, tenant: str = "") -> Version | None:
        """What a request's ``model`` means: an adapter version, or None for the base model.

        Understands ``name``, ``name@3`` and ``name@sha256:<12 to 64 hex digits>``. Raises
        :class:`AdapterNotFound`.
        """
        if model == self._model.name:
            return None
        if "@" not in model:
            return self.current(model)
        match = _REFERENCE.fullmatch(model)
        if match is None:
            raise self._not_found(model)
        if match["number"]:
            version = self._catalog.numbered(match["name"], int(match["number"]))
        else:
            found = self._catalog.with_digest(match["name"], match["digest"])
            version = found[0] if len(found) == 1 else None
        if version is None:
            raise self._not_found(model)
        return version

    def _not_found(self, model: str) -> AdapterNotFound:
        """The error for an unknown model, naming those there are."""
        names = self._catalog.names(_MAX_NAMES_SHOWN + 1)
        known = ", ".join([f"{self._model.name} (base)", *names[:_MAX_NAMES_SHOWN]])
        more = " and others" if len(names) > _MAX_NAMES_SHOWN else ""
        return AdapterNotFound(
            explain("model", model, f"one of {known}{more}; optionally with @<version> or ")
            + f"@sha256:<{MIN_DIGEST_PREFIX} or more hex digits>",
            field="model",
        )

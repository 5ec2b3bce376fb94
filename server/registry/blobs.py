"""Adapter files by content: a file's name is the SHA-256 of its bytes.

No path a client names is ever opened; a path is built from a digest of 64 hex digits only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from reft_core.errors import AdapterNotFound, RequestFailed
from reft_core.spec import DIGEST_PATTERN
from server.registry.incoming import (
    Incoming,
    abandoned,
    make_folder_durably,
    storage_errors,
    sync_folder,
)

SUFFIX = ".safetensors"


class BlobStore(Protocol):
    """Files by digest. Thread-safe; several processes may use one."""

    @property
    def temporary(self) -> Path:
        """A local folder for uploads that have not arrived yet."""

    def put(self, file: Incoming) -> None:
        """Store a file durably, whole or not at all, unless it is stored already."""

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``, checked against it.

        Raises :class:`AdapterNotFound` if there are none, :class:`RequestFailed` if they are
        damaged, :class:`StorageUnavailable` if the store does not answer.
        """

    def holds(self, digest: str, num_bytes: int) -> bool:
        """Whether ``digest`` seems to be stored whole, as far as can be told cheaply."""

    def remove(self, digest: str) -> None:
        """Forget ``digest``; no-op if it is not stored."""

    def digests(self) -> Iterator[str]:
        """Everything that is stored."""

    def strangers(self) -> Iterator[str]:
        """What is in the store's place but is not named like a file of it."""


class FolderBlobs:
    """Files under ``root/<first two hex digits>/<digest>.safetensors``: a :class:`BlobStore`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / "incoming"
        make_folder_durably(root)
        make_folder_durably(self._temporary)

    @property
    def temporary(self) -> Path:
        """In the same file system, so that what arrived there is only renamed."""
        return self._temporary

    def put(self, file: Incoming) -> None:
        """See :class:`BlobStore`. A damaged file is replaced."""
        path = self._path(file.digest)
        with storage_errors():
            known = path.is_file() and _digest_of(path) == file.digest
        if not known:
            file.move_to(path)
            return
        with storage_errors():
            sync_folder(path.parent)  # whoever put it there may have died before this

    def get(self, digest: str) -> bytes:
        """See :class:`BlobStore`."""
        try:
            with storage_errors():
                data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise gone(digest) from None
        return verified(data, digest)

    def holds(self, digest: str, num_bytes: int) -> bool:
        """See :class:`BlobStore`. A local file is read: that costs less than a damaged one."""
        path = self._path(digest)
        return path.is_file() and _digest_of(path) == digest

    def remove(self, digest: str) -> None:
        """See :class:`BlobStore`."""
        with storage_errors():
            self._path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """See :class:`BlobStore`."""
        return (path.stem for path in self._root.glob("??/*") if is_blob(path.name))

    def strangers(self) -> Iterator[str]:
        """See :class:`BlobStore`. Temporary files of earlier releases are among them."""
        files = (path for path in self._root.glob("??/*") if path.is_file())
        return (str(path) for path in files if not is_blob(path.name))

    def __contains__(self, digest: str) -> bool:
        return self._path(digest).is_file()

    def __len__(self) -> int:
        return sum(1 for _ in self.digests())

    def _path(self, digest: str) -> Path:
        """Where ``digest`` is or would be stored."""
        return self._root / blob_path(digest)


def blob_path(digest: str) -> str:
    """Where ``digest`` is in a store, relative to its root."""
    assert re.fullmatch(DIGEST_PATTERN, digest), "a digest is 64 hex digits"
    return f"{digest[:2]}/{digest}{SUFFIX}"


def is_blob(name: str) -> bool:
    """Whether a file is named like a stored one."""
    return name.endswith(SUFFIX) and bool(re.fullmatch(DIGEST_PATTERN, name.removesuffix(SUFFIX)))


def verified(data: bytes, digest: str) -> bytes:
    """``data``, whose digest is this one. Raises :class:`RequestFailed` otherwise."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise RequestFailed(f"the stored file of adapter sha256:{digest[:12]} is damaged")
    return data


def gone(digest: str) -> AdapterNotFound:
    """The error for a file that is not stored."""
    return AdapterNotFound(
        f"model: the file of adapter sha256:{digest[:12]} is gone; it was deleted", field="model"
    )


def sweep_temporary(store: BlobStore) -> list[Path]:
    """Remove what uploads left whose process died, and return it."""
    left = list(abandoned(store.temporary))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def _digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

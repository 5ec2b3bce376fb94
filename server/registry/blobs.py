"""Adapter files by content: a folder in which a file's name is the SHA-256 of its bytes.

No path a client names is ever opened; a path is built from a digest of 64 hex digits only.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from reft_core.adapter import write_durably
from reft_core.errors import AdapterNotFound, RequestFailed
from reft_core.spec import DIGEST_PATTERN

_SUFFIX = ".safetensors"


class BlobStore:
    """Files under ``root/<first two hex digits>/<digest>.safetensors``. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        _make_folder_durably(root)

    def put(self, data: bytes) -> str:
        """Store ``data`` durably and return its digest. Storing it twice changes nothing."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if not path.is_file() or _digest_of(path) != digest:
            _make_folder_durably(path.parent)
            write_durably(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``, checked against it.

        Raises :class:`AdapterNotFound` if there are none, :class:`RequestFailed` if the file
        is damaged.
        """
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise AdapterNotFound(
                f"model: the file of adapter sha256:{digest[:12]} is gone; it was deleted",
                field="model",
            ) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise RequestFailed(f"the stored file of adapter sha256:{digest[:12]} is damaged")
        return data

    def remove(self, digest: str) -> None:
        """Forget ``digest``; no-op if it is not stored."""
        self._path(digest).unlink(missing_ok=True)

    def sweep(self, keep: set[str], *, older_than_s: float) -> int:
        """Remove old files whose digest is not in ``keep``, and return how many.

        Such files are left by a crash between storing a file and recording it, or between
        forgetting it and removing it. Young ones may belong to an upload in progress.
        """
        limit = time.time() - older_than_s
        removed = 0
        for path in self._files():
            if path.name.removesuffix(_SUFFIX) not in keep and path.stat().st_mtime < limit:
                path.unlink()
                removed += 1
        return removed

    def __contains__(self, digest: str) -> bool:
        return self._path(digest).is_file()

    def __len__(self) -> int:
        return sum(path.suffix == _SUFFIX for path in self._files())

    def _files(self) -> Iterator[Path]:
        """Every file below the root, temporary ones included."""
        return (path for path in self._root.glob("??/*") if path.is_file())

    def _path(self, digest: str) -> Path:
        """Where ``digest`` is or would be stored."""
        assert re.fullmatch(DIGEST_PATTERN, digest), "a digest is 64 hex digits"
        return self._root / digest[:2] / f"{digest}{_SUFFIX}"


def _digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_folder_durably(folder: Path) -> None:
    """Create ``folder`` and make its own entry survive a power cut."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)

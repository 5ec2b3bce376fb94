"""Uploads while they arrive: temporary files, hashed as they are written.

Each is locked by the process that writes it, so a file that can be locked was left by one that
died, and any other process may remove it, at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from reft_core.errors import StorageUnavailable

_PREFIX = ".tmp-"


class Incoming:
    """One temporary file. Closing it removes it, unless it was moved to where it belongs."""

    def __init__(self, folder: Path) -> None:
        with storage_errors():
            descriptor, path = tempfile.mkstemp(dir=folder, prefix=_PREFIX)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self.path = Path(path)
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def digest(self) -> str:
        """SHA-256 of what was written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append ``data``. Raises :class:`StorageUnavailable`, such as for a full disk."""
        view = memoryview(data)
        with storage_errors():
            while view:
                view = view[os.write(self._descriptor, view) :]
        self._hash.update(data)
        self.num_bytes += len(data)

    def read(self) -> bytes:
        """Everything that was written."""
        with storage_errors():
            return self.path.read_bytes()

    def move_to(self, path: Path) -> None:
        """Put the file at ``path`` so that it is there whole, also after a power cut."""
        with storage_errors():
            os.fchmod(self._descriptor, 0o644)
            os.fsync(self._descriptor)
            make_folder_durably(path.parent)
            os.replace(self.path, path)
            sync_folder(path.parent)

    def close(self) -> None:
        """Let go of the file; it is removed unless it was moved. May be called again."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def abandoned(folder: Path) -> Iterator[Path]:
    """Temporary files whose writers have died."""
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Held by nobody. It may have been moved or removed since it was listed.
            is_it = path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino
        except BlockingIOError:
            is_it = False
        finally:
            os.close(descriptor)
        if is_it:
            yield path


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn the operating system's errors into ours; but that there is no such file is no fault."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageUnavailable(f"adapter files cannot be stored: {error.strerror}") from error


def make_folder_durably(folder: Path) -> None:
    """Create ``folder`` and make its own entry survive a power cut."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Write a folder's entries through to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

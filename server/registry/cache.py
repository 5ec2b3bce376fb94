"""Files of a remote store that were read before, in a local folder of bounded size."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import structlog

from reft_core.errors import RequestFailed, StorageUnavailable
from server.registry.blobs import blob_path, is_blob, verified
from server.registry.incoming import Incoming

log = structlog.get_logger(__name__)


class FileCache:
    """Bytes by digest, least recently used out first. Thread-safe.

    Not durable, and never trusted: what is read is checked, and dropped if it is damaged. A disk
    that takes nothing more makes it useless, not wrong.
    """

    def __init__(self, folder: Path, temporary: Path, max_bytes: int) -> None:
        """``temporary`` is a folder in the same file system, for what is being written."""
        self._folder = folder
        self._temporary = temporary
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        found = [path for path in folder.glob("??/*") if is_blob(path.name)]
        for path in sorted(found, key=lambda path: path.stat().st_mtime):
            self._count(path.stem, path.stat().st_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that are kept."""
        return self._num_bytes

    def get(self, digest: str) -> bytes | None:
        """The bytes of ``digest``, or None if they are not here any more, or damaged."""
        path = self._folder / blob_path(digest)
        try:
            data = verified(path.read_bytes(), digest)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, RequestFailed) as error:
            log.warning("a cached adapter file cannot be used", digest=digest, error=str(error))
            self.remove(digest)
            return None
        with self._lock:
            if digest in self._sizes:
                self._sizes.move_to_end(digest)
        return data

    def put(self, digest: str, data: bytes) -> None:
        """Keep ``data``, if it fits at all."""
        if len(data) > self._max_bytes:
            return
        path = self._folder / blob_path(digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with Incoming(self._temporary) as file:
                file.write(data)
                os.replace(file.path, path)
        except (OSError, StorageUnavailable) as error:
            log.warning("an adapter file was not cached", digest=digest, error=str(error))
            return
        self._count(digest, len(data))

    def remove(self, digest: str) -> None:
        """Drop ``digest``; no-op if it is not here."""
        with self._lock:
            self._num_bytes -= self._sizes.pop(digest, 0)
        (self._folder / blob_path(digest)).unlink(missing_ok=True)

    def _count(self, digest: str, num_bytes: int) -> None:
        """Note a file that is kept, and drop the oldest while there are too many bytes."""
        with self._lock:
            self._num_bytes += num_bytes - self._sizes.pop(digest, 0)
            self._sizes[digest] = num_bytes
            excess = []
            while self._num_bytes > self._max_bytes:
                oldest, size = self._sizes.popitem(last=False)
                self._num_bytes -= size
                excess.append(oldest)
        for oldest in excess:
            (self._folder / blob_path(oldest)).unlink(missing_ok=True)

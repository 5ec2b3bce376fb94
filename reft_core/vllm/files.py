"""Where a process finds adapter files by digest: this machine's spool, and places that are shared.

A file that arrives while vLLM runs is put into the spool, from which every process of the machine
reads it: workers that share a model, API servers that were not asked, and data-parallel ranks
that join later. What a file is called in a shared place is its owner's affair; here it is its
SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from reft_core.adapter import MAX_ADAPTER_BYTES

_SUFFIX = ".safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Listed:
    """A file in a shared place, as it was when it was read."""

    version: object
    digest: str


class AdapterFiles:
    """The adapter files that a process can reach. Used by one thread at a time."""

    def __init__(self, spool: Path, spool_bytes: int, places: Collection[str] = ()) -> None:
        self._spool = spool
        self._spool_bytes = spool_bytes
        self._places = [url_to_fs(place) for place in places]
        self._listed: list[dict[str, _Listed]] = [{} for _ in self._places]
        """For each place, its files by path."""
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, digest: str) -> bytes | None:
        """The file of this digest, or None if it is nowhere to be found whole.

        One from a shared place is in the spool afterwards, so that it outlives its owner's.
        """
        data = self._in_spool(digest) or self._in_places(digest)
        if data is None and self._places:
            data = self.refresh().get(digest) or self._in_places(digest)
        if data is not None:
            self.put(data)
        return data

    def put(self, data: bytes, held: Collection[str] = ()) -> str:
        """Keep a file in the spool for every process of this machine; returns its digest.

        If the spool grows too large, the oldest files go whose digests are not ``held``.
        """
        digest = _digest(data)
        if not self._path(digest).is_file() or self._in_spool(digest) is None:
            # Read back by its hash, so it need not survive a power cut, only never be half there.
            with tempfile.NamedTemporaryFile(dir=self._spool, delete=False) as file:
                file.write(data)
            os.replace(file.name, self._path(digest))
            self._trim({digest, *held})
        return digest

    def refresh(self) -> dict[str, bytes]:
        """Look at the shared places again; returns by digest the files that are new to this
        process. A place that does not answer keeps what was known of it.
        """
        fresh: dict[str, bytes] = {}
        for number, (system, root) in enumerate(self._places):
            try:
                facts_by_path = system.find(root, detail=True)
            except OSError as error:
                log.warning("adapters: %s cannot be listed: %s", root, error)
                continue
            before, now = self._listed[number], {}
            for path, facts in facts_by_path.items():
                if not path.endswith(_SUFFIX) or (facts.get("size") or 0) > MAX_ADAPTER_BYTES:
                    continue
                version = [facts.get(key) for key in ("ino", "mtime", "size", "ETag")]
                if path in before and before[path].version == version:
                    now[path] = before[path]
                elif (data := _read(system, path)) is not None:
                    now[path] = _Listed(version, _digest(data))
                    fresh[now[path].digest] = data
            self._listed[number] = now
        return fresh

    def listed(self) -> set[str]:
        """Digests of the files that the last look at the shared places has found."""
        return {file.digest for place in self._listed for file in place.values()}

    def _in_places(self, digest: str) -> bytes | None:
        for (system, _), place in zip(self._places, self._listed, strict=True):
            for path, file in place.items():
                if file.digest == digest:
                    data = _read(system, path)
                    if data is not None and _digest(data) == digest:
                        return data
        return None

    def _in_spool(self, digest: str) -> bytes | None:
        try:
            data = self._path(digest).read_bytes()
        except OSError:
            return None
        return data if _digest(data) == digest else None

    def _path(self, digest: str) -> Path:
        return self._spool / f"{digest}{_SUFFIX}"

    def _trim(self, held: Collection[str]) -> None:
        """Remove the oldest files beyond the budget, but for those held."""
        files = [
            (entry.stat(), Path(entry.path))
            for entry in os.scandir(self._spool)
            if entry.name.endswith(_SUFFIX)
        ]
        excess = sum(facts.st_size for facts, _ in files) - self._spool_bytes
        for facts, path in sorted(files, key=lambda file: file[0].st_mtime):
            if excess <= 0:
                return
            if path.name.removesuffix(_SUFFIX) not in held:
                path.unlink(missing_ok=True)
                excess -= facts.st_size


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(system: Any, path: str) -> bytes | None:
    try:
        found: bytes = system.cat_file(path)
    except OSError as error:
        log.warning("adapters: %s cannot be read: %s", path, error)
        return None
    return found

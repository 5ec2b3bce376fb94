"""Where a process finds adapter files by digest: this machine's spool, and places that are shared.

A file that arrives while vLLM runs is put into the spool, from which every process of the machine
reads it: workers that share a device's load, API servers that were not asked, and data-parallel
ranks that join later. Names of files are the owner's; what a file is called here is its SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from reft_core.adapter import MAX_ADAPTER_BYTES, write_durably

_SUFFIX = ".safetensors"

log = logging.getLogger(__name__)


class AdapterFiles:
    """The adapter files that a process can reach. Used by one thread."""

    def __init__(self, spool: Path, spool_bytes: int, places: Collection[str] = ()) -> None:
        self._spool = spool
        self._spool_bytes = spool_bytes
        self._places = [url_to_fs(place) for place in places]
        self._found: dict[str, tuple[Any, str]] = {}
        """By digest, the file system and path of a file in a shared place."""
        self._seen: set[tuple[int, str, object]] = set()
        """Files of shared places that have been read, each with what tells its versions apart."""
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, digest: str) -> bytes | None:
        """The file of this digest, or None if it is nowhere to be found whole."""
        data = self._in_spool(digest)
        if data is not None:
            return data
        if digest not in self._found:
            for _ in self.scan(stem=digest):
                pass
        if digest not in self._found:
            return None
        system, path = self._found[digest]
        data = _read(system, path)
        return data if data is not None and _digest(data) == digest else None

    def put(self, data: bytes, held: Collection[str] = ()) -> str:
        """Keep a file in the spool for every process of this machine; returns its digest.

        If the spool grows too large, the oldest files go whose digests are not ``held``.
        """
        digest = _digest(data)
        path = self._path(digest)
        if self._in_spool(digest) is None:
            write_durably(path, data)
            self._trim({digest, *held})
        return digest

    def scan(self, stem: str | None = None) -> Iterator[tuple[str, bytes]]:
        """Digest and bytes of each file in the shared places that was not seen before.

        With ``stem``, only of files so named.
        """
        for number, (system, root) in enumerate(self._places):
            try:
                listed = system.find(root, detail=True)
            except OSError as error:
                log.warning("adapters: %s cannot be listed: %s", root, error)
                continue
            for path, facts in sorted(listed.items()):
                name = path.rsplit("/", 1)[-1]
                if not name.endswith(_SUFFIX) or stem not in (None, name.removesuffix(_SUFFIX)):
                    continue
                version = facts.get("mtime") or facts.get("ETag") or facts.get("LastModified")
                seen = number, path, version
                if seen in self._seen or (facts.get("size") or 0) > MAX_ADAPTER_BYTES:
                    continue
                data = _read(system, path)
                if data is not None:
                    self._seen.add(seen)
                    digest = _digest(data)
                    self._found[digest] = system, path
                    yield digest, data

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
        entries = [
            (entry.stat(), Path(entry.path))
            for entry in os.scandir(self._spool)
            if entry.name.endswith(_SUFFIX)
        ]
        excess = sum(facts.st_size for facts, _ in entries) - self._spool_bytes
        for facts, path in sorted(entries, key=lambda entry: entry[0].st_mtime):
            if excess <= 0:
                return
            if path.name.removesuffix(_SUFFIX) not in held:
                path.unlink(missing_ok=True)
                excess -= facts.st_size


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(system: fsspec.AbstractFileSystem, path: str) -> bytes | None:
    try:
        found: bytes = system.cat_file(path)
    except OSError as error:
        log.warning("adapters: %s cannot be read: %s", path, error)
        return None
    return found

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
import re
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from reft_core.adapter import MAX_ADAPTER_BYTES

_SUFFIX = ".safetensors"
_VERSIONS = re.compile(r"time|modified|created|updated|etag|md5|sha|crc|ino$|version|generation")
"""Names, in lower case, of what tells a file from the one that replaces it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Listed:
    """A file in a shared place, as it was when it was read."""

    facts: dict[str, Any]
    """What the place says of it: of most, times and tags that change with the file."""
    digest: str


class AdapterFiles:
    """The adapter files that a process can reach. Used by one thread at a time."""

    def __init__(self, spool: Path, spool_bytes: int, places: Collection[str] = ()) -> None:
        self._spool = spool
        self._spool_bytes = spool_bytes
        self._places = [url_to_fs(place) for place in places]
        self._listed: list[dict[str, _Listed]] = [{} for _ in self._places]
        """For each place, its files by path."""
        self._held: Collection[str] = ()
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, digest: str, *, looks: bool = True) -> bytes | None:
        """The file of this digest, or None if it is nowhere to be found whole, also after another
        look at the shared places, unless the caller ``looks`` there itself.

        One from a shared place is in the spool afterwards, so that it outlives its owner's.
        """
        data = self._in_spool(digest)
        if data is not None:
            return data
        data = self._in_places(digest)
        if data is None and self._places and looks:
            data = self.refresh().get(digest) or self._in_places(digest)
        if data is not None:
            self._write(digest, data)
        return data

    def put(self, data: bytes, held: Collection[str] | None = None) -> str:
        """Keep a file in the spool for every process of this machine; returns its digest.

        If the spool grows too large, now or later, those that were not used for longest go. Files
        of digests that are in ``held`` then, if it is given, stay.
        """
        if held is not None:
            self._held = held
        digest = _digest(data)
        if self._in_spool(digest) is None:
            self._write(digest, data)
        return digest

    def refresh(self) -> dict[str, bytes]:
        """Look at the shared places again; returns by digest the files that are new to this
        process. A place that does not answer keeps what was known of it.
        """
        fresh: dict[str, bytes] = {}
        for number, (system, root) in enumerate(self._places):
            try:
                system.invalidate_cache()
                facts_by_path = system.find(root, detail=True)
            except Exception as error:  # each kind of place has its own
                log.warning("adapters: %s cannot be listed: %r", root, error)
                continue
            before, now = self._listed[number], {}
            for path, facts in facts_by_path.items():
                if not path.endswith(_SUFFIX) or (facts.get("size") or 0) > MAX_ADAPTER_BYTES:
                    continue
                old = before.get(path)
                if old is not None and old.facts == facts and _tells_versions(facts):
                    now[path] = old
                elif (data := _read(system, path)) is not None:
                    now[path] = _Listed(facts, _digest(data))
                    if old is None or old.digest != now[path].digest:
                        fresh[now[path].digest] = data
                elif old is not None:
                    now[path] = old
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
        """The file of this digest, which counts as used now."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if _digest(data) == digest else None

    def _write(self, digest: str, data: bytes) -> None:
        """Put a file into the spool, and make room for it."""
        # Read back by its hash, so it need not survive a power cut, only never be half there.
        with tempfile.NamedTemporaryFile(dir=self._spool, delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.replace(file.name, self._path(digest))
            except BaseException:
                os.unlink(file.name)
                raise
        self._trim({digest, *self._held})

    def _path(self, digest: str) -> Path:
        return self._spool / f"{digest}{_SUFFIX}"

    def _trim(self, keep: Collection[str]) -> None:
        """Remove what was not used for longest, beyond the budget, but for these digests."""
        files = []
        for path in self._spool.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):  # another process has been quicker
                files.append((path.stat(), path))
        excess = sum(facts.st_size for facts, _ in files) - self._spool_bytes
        for facts, path in sorted(files, key=lambda file: file[0].st_mtime):
            if excess <= 0:
                return
            if path.name.removesuffix(_SUFFIX) not in keep:
                path.unlink(missing_ok=True)
                excess -= facts.st_size


def _tells_versions(facts: Mapping[str, Any]) -> bool:
    """Whether equal facts mean an equal file; a list over HTTP has names and sizes alone."""
    return any(_VERSIONS.search(name.lower()) and value for name, value in facts.items())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(system: Any, path: str) -> bytes | None:
    try:
        found: bytes = system.cat_file(path)
    except Exception as error:
        log.warning("adapters: %s cannot be read: %r", path, error)
        return None
    return found

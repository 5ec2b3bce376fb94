"""Adapter files in an object store, such as an S3 bucket, through fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from reft_core.errors import InvalidRequest, ReftError, StorageUnavailable, explain
from server.registry.blobs import blob_path, gone, is_blob, verified
from server.registry.cache import FileCache
from server.registry.incoming import Incoming, make_folder_durably


class RemoteBlobs:
    """Objects ``<root>/<first two hex digits>/<digest>.safetensors``: a ``BlobStore``.

    Nothing is remembered of what the store holds. Bytes that were read stay in a local cache,
    which cannot be out of date, as an object's name is its content.
    """

    def __init__(self, url: str, options: dict[str, Any], folder: Path, cache_bytes: int) -> None:
        """``folder`` is a local one, for the cache and for uploads that arrive.

        Raises :class:`InvalidRequest` for a URL or options that fsspec does not take.
        """
        forget = {"use_listings_cache": False, "skip_instance_cache": True}
        try:
            self._fs, self._root = fsspec.url_to_fs(url, **(forget | options))
        except (ImportError, ValueError, TypeError) as error:
            raise InvalidRequest(
                explain("blob_url", url, f"the URL of a store that fsspec opens ({error})"),
                field="blob_url",
            ) from None
        self._temporary = folder / "incoming"
        make_folder_durably(self._temporary)
        self._cache = FileCache(folder / "cache", self._temporary, cache_bytes)

    @property
    def temporary(self) -> Path:
        """See ``BlobStore``."""
        return self._temporary

    def put(self, file: Incoming) -> None:
        """See ``BlobStore``. It is there once the store has said so, and its size is right."""
        if self.holds(file.digest, file.num_bytes):
            return
        path = self._path(file.digest)
        with _storage_errors():
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
            self._fs.put_file(str(file.path), path)
            stored = int(self._fs.size(path))
        if stored != file.num_bytes:
            raise StorageUnavailable(
                f"the store kept {stored} of {file.num_bytes} bytes of sha256:{file.digest[:12]}"
            )

    def get(self, digest: str) -> bytes:
        """See ``BlobStore``."""
        data = self._cache.get(digest)
        if data is not None:
            return data
        data = self.get_stored(digest)
        self._cache.put(digest, data)
        return data

    def get_stored(self, digest: str) -> bytes:
        """See ``BlobStore``."""
        with _storage_errors():
            try:
                data = bytes(self._fs.cat_file(self._path(digest)))
            except FileNotFoundError:
                raise gone(digest) from None
        return verified(data, digest)

    def holds(self, digest: str, num_bytes: int) -> bool:
        """See ``BlobStore``. Asks for the size only: an object is stored whole or not at all."""
        with _storage_errors():
            try:
                return int(self._fs.size(self._path(digest))) == num_bytes
            except FileNotFoundError:
                return False

    def remove(self, digest: str) -> None:
        """See ``BlobStore``."""
        self._cache.remove(digest)
        with _storage_errors():
            try:
                self._fs.rm_file(self._path(digest))
            except FileNotFoundError:
                return

    def digests(self) -> Iterator[str]:
        """See ``BlobStore``. Lists the whole store."""
        names = (path.rpartition("/")[2] for path in self._files())
        return (name.partition(".")[0] for name in names if is_blob(name))

    def strangers(self) -> Iterator[str]:
        """See ``BlobStore``."""
        return (path for path in self._files() if not is_blob(path.rpartition("/")[2]))

    def _files(self) -> list[str]:
        with _storage_errors():
            try:
                return [str(path) for path in self._fs.find(self._root)]
            except FileNotFoundError:
                return []

    def _path(self, digest: str) -> str:
        """Where ``digest`` is or would be stored."""
        return f"{self._root.rstrip('/')}/{blob_path(digest)}"


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Turn whatever a store's client raises into our error: each has exceptions of its own."""
    try:
        yield
    except ReftError:
        raise
    except Exception as error:
        raise StorageUnavailable(
            "the store of adapter files does not answer", reason=f"{type(error).__name__}: {error}"
        ) from error

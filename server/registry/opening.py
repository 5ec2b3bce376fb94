"""The registry's parts as the settings say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec

from reft_core.sites import ModelDescription
from server.registry.blobs import BlobStore, FolderBlobs
from server.registry.registry import Registry
from server.registry.remote import RemoteBlobs
from server.registry.signing import SignatureCheck

if TYPE_CHECKING:
    from server.settings import Settings


def open_registry(settings: Settings, model: ModelDescription) -> Registry:
    """The registry of the settings, for one base model."""
    return Registry.open(
        settings.data_dir,
        model,
        settings.max_adapter_bytes,
        database=settings.database,
        blobs=open_store(settings),
        signatures=SignatureCheck(settings.signatures, settings.signing_public_key),
    )


def open_store(settings: Settings) -> BlobStore:
    """The store of adapter files that the settings name. Raises :class:`InvalidRequest`.

    Local ones are ours even by URL: fsspec does not write through to the disk.
    """
    url = settings.blob_url
    if url is None:
        return FolderBlobs(settings.data_dir / "blobs")
    protocol, path = fsspec.core.split_protocol(url)
    if protocol in (None, "file", "local"):
        return FolderBlobs(Path(path))
    options = json.loads(settings.blob_options.get_secret_value())
    return RemoteBlobs(url, options, settings.data_dir / "remote", settings.blob_cache_bytes)

"""Which adapters exist: names and versions in a catalog, files in a blob store."""

from server.registry.blobs import BlobStore
from server.registry.catalog import Catalog, Version
from server.registry.registry import Deleted, Registry, Uploaded

__all__ = ["BlobStore", "Catalog", "Deleted", "Registry", "Uploaded", "Version"]

"""Which adapters exist: names and versions in a database, files in a store.

``registry`` is what the rest of the server uses. ``catalog`` finds versions and ``changes`` makes
changes, each with its entry in ``audit``; ``versions`` has the queries of both and ``tables`` the
tables. ``blobs`` keeps files in a folder, ``remote`` in an object store behind ``cache``;
``incoming`` is a file that still arrives and ``signing`` checks its signature. ``opening`` does
what the settings say, and ``check`` compares all of it.
"""

from server.registry.audit import AuditEntry
from server.registry.blobs import BlobStore, FolderBlobs
from server.registry.catalog import Catalog, Filter
from server.registry.changes import Deleted
from server.registry.incoming import Incoming
from server.registry.opening import open_registry, open_store
from server.registry.registry import Registry, Uploaded
from server.registry.versions import SHARED, Version

__all__ = [
    "SHARED",
    "AuditEntry",
    "BlobStore",
    "Catalog",
    "Deleted",
    "Filter",
    "FolderBlobs",
    "Incoming",
    "Registry",
    "Uploaded",
    "Version",
    "open_registry",
    "open_store",
]

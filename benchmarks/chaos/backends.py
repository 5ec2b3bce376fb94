"""Where the catalog and the files of a server are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.services.postgres import find_binaries, run_postgres
from benchmarks.services.s3 import run_s3

BACKENDS = ("sqlite", "postgresql", "postgresql-s3")


@contextmanager
def open_backend(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The settings of a server on a backend, whose programs run as long as the context."""
    settings: dict[str, Any] = {"data_dir": folder / "data"}
    with ExitStack() as stack:
        if name.startswith("postgresql"):
            binaries = find_binaries()
            if binaries is None:
                raise SystemExit("PostgreSQL's server is not installed (/usr/lib/postgresql)")
            settings["database_url"] = stack.enter_context(run_postgres(binaries)).new_database()
        if name.endswith("s3"):
            store = stack.enter_context(run_s3())
            settings["blob_url"] = store.new_bucket()
            settings["blob_options"] = json.dumps(store.options)
        yield settings

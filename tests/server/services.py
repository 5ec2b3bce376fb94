"""Fixtures of real services, skipped with the reason where their programs are not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.services.postgres import Postgres, find_binaries, run_postgres
from server.database import sqlite_url


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server is not installed (/usr/lib/postgresql/*/bin/initdb)")
    with run_postgres(binaries) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "catalog.sqlite")
    return request.getfixturevalue("postgres").new_database()

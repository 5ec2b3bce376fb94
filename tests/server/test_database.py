from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import server.keys.store
import server.registry.tables  # noqa: F401  # its tables are in the metadata
from benchmarks.services.ports import free_port
from reft_core.adapter import decode_adapter
from reft_core.errors import DatabaseUnavailable, InvalidRequest
from server.database import (
    _PATIENCE,
    lock,
    metadata,
    open_database,
    reading,
    sqlite_url,
    writing,
)
from server.registry import Catalog, Filter, Version
from tests.server.fakes import make_adapter


def revision(url: str) -> str:
    engine = open_database(url)
    with reading(engine) as connection:
        found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    engine.dispose()
    return str(found)


def test_migrations_end_in_exactly_the_tables_the_code_uses(database_url):
    engine = open_database(database_url)
    with reading(engine) as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_opening_again_changes_nothing(database_url):
    assert revision(database_url) == revision(database_url)


OPENS = """
import sys
from server.database import open_database
print("ready", flush=True)
sys.stdin.readline()
open_database(sys.argv[1]).dispose()
"""


def test_processes_that_start_at_once_migrate_once(database_url):
    with ExitStack() as stack:
        starts = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", OPENS, database_url],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]
        for start in starts:
            assert start.stdout.readline() == "ready\n"
        for start in starts:
            start.stdin.write("\n")
            start.stdin.flush()
        for start in starts:
            start.wait(60)
    assert [start.returncode for start in starts] == [0] * 4
    engine = open_database(database_url)
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM alembic_version")) == 1
    engine.dispose()


def test_a_migration_that_fails_leaves_the_database_as_it_was(database_url, monkeypatch):
    from alembic import op

    def crash(*_args, **_options):
        raise RuntimeError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(op, "create_index", crash)
        with pytest.raises(RuntimeError, match="the disk is gone"):
            open_database(database_url)
    assert revision(database_url)


def test_a_database_of_a_newer_release_is_refused(database_url):
    engine = open_database(database_url)
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(InvalidRequest, match="newer release"):
        open_database(database_url)


@pytest.mark.parametrize("change", ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"])
def test_the_database_refuses_to_change_the_audit_log(database_url, change):
    engine = open_database(database_url)
    row = "INSERT INTO audit (at, actor, tenant, action, name, detail) VALUES (1,'a','','b','c','')"
    with writing(engine) as connection:
        connection.execute(text(row))
    with pytest.raises(DBAPIError, match="never changed"), writing(engine) as connection:
        connection.execute(text(change))
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT actor FROM audit")) == "a"
    engine.dispose()


def test_what_is_locked_is_waited_for(database_url):
    """In SQLite every writer waits, in PostgreSQL those that lock the same thing."""
    engine = open_database(database_url)
    order: list[str] = []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with writing(engine) as connection:
            lock(connection, "b", "a")
            order.append("second")

    thread = threading.Thread(target=second)
    with writing(engine) as connection:
        lock(connection, "a")
        thread.start()
        begun.wait()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    engine.dispose()


def test_a_failure_undoes_the_whole_transaction(database_url):
    engine = open_database(database_url)

    def fail() -> None:
        with writing(engine) as connection:
            connection.execute(text("INSERT INTO trash (digest, since) VALUES ('x', 1)"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM trash")) == 0
    engine.dispose()


@pytest.mark.parametrize("url", ["mysql://root:hush@host/x", "hush:/x", "", "data/x.sqlite"])
def test_other_urls_are_refused_without_showing_a_password(url):
    with pytest.raises(InvalidRequest, match="database_url") as caught:
        open_database(url)
    assert "hush@" not in str(caught.value)


def test_a_database_that_does_not_answer_is_unavailable():
    url = f"postgresql://user:hush@127.0.0.1:{free_port()}/x?connect_timeout=2"
    with pytest.raises(DatabaseUnavailable) as caught:
        open_database(url)
    assert "hush" not in str(caught.value)


def test_a_database_that_says_nothing_is_unavailable_before_long(monkeypatch):
    monkeypatch.setitem(_PATIENCE, "connect_timeout", "2")  # the least there is
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(DatabaseUnavailable):
            open_database(url)


def test_a_standby_is_unavailable_for_changes_until_it_takes_them(postgres):
    url = postgres.new_database()
    name = url.rpartition("/")[2].partition("?")[0]
    owner = open_database(f"{url}?options=-c%20default_transaction_read_only%3Doff")

    def switch(read_only: str) -> None:
        with writing(owner) as connection:
            connection.execute(
                text(f"ALTER DATABASE {name} SET default_transaction_read_only = {read_only}")
            )

    def insert() -> None:
        with writing(engine) as connection:
            connection.execute(text("INSERT INTO trash (digest, since) VALUES ('x', 1)"))

    switch("on")
    engine = open_database(url)
    with pytest.raises(DatabaseUnavailable, match="takes no changes") as caught:
        insert()
    assert "read-only transaction" in str(caught.value)
    assert "read-only" not in caught.value.message
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM trash")) == 0
    switch("off")
    with pytest.raises(DatabaseUnavailable):
        insert()  # on the connection from before, which is not used again
    insert()
    engine.dispose()
    owner.dispose()


def test_the_url_may_say_how_long_a_database_is_waited_for(postgres):
    for more, expected in (("", "10"), ("&keepalives_idle=77", "77")):
        url = postgres.new_database()
        engine = open_database(url + ("&" if "?" in url else "?") + "application_name=x" + more)
        with reading(engine) as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            assert driver.info.get_parameters()["keepalives_idle"] == expected
        engine.dispose()


def test_sqlite_writes_through_to_the_disk(tmp_path: Path):
    engine = open_database(sqlite_url(tmp_path / "new folder" / "catalog.sqlite"))
    with reading(engine) as connection:
        pragma = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10000}
    assert pragma == expected


def test_a_catalog_from_before_migrations_is_upgraded_without_loss(tmp_path: Path):
    spec = decode_adapter(make_adapter(1)).spec
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as old:
        old.executescript(
            """
            CREATE TABLE names (name VARCHAR(96) NOT NULL PRIMARY KEY, current INTEGER,
                last_number INTEGER NOT NULL);
            CREATE TABLE versions (name VARCHAR(96) NOT NULL, number INTEGER NOT NULL,
                digest VARCHAR(64) NOT NULL, num_bytes INTEGER NOT NULL,
                created_at INTEGER NOT NULL, spec TEXT NOT NULL, PRIMARY KEY (name, number),
                FOREIGN KEY(name) REFERENCES names (name), UNIQUE (name, digest));
            CREATE INDEX ix_versions_digest ON versions (digest);
            INSERT INTO names VALUES ('gone', NULL, 4), ('tone', 1, 2);
            """
        )
        rows = [("tone", n, str(n) * 64, 100 + n, 1000 + n, spec.to_json()) for n in (1, 2)]
        old.executemany("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", rows)
        old.commit()
    catalog = Catalog.at(sqlite_url(tmp_path / "catalog.sqlite"))
    try:
        first, second = catalog.versions("tone")
        assert catalog.current("tone") == first
        assert first == Version("tone", 1, "1" * 64, 101, 1001, spec)
        assert (second.number, second.digest) == (2, "2" * 64)
        assert catalog.page(Filter(method=spec.method, base=spec.base.name)) == [first]
        with catalog.changing("", "gone", "test") as change:
            assert change.add("a" * 64, 1, spec)[0].number == 5
    finally:
        catalog.close()

"""The one database of a server: opened by URL, brought up to date, read and written.

SQLite is embedded and the default; PostgreSQL is for several replicas. Tables of every part
(registry, keys) share :data:`metadata`, and their history is in ``server/migrations``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, MetaData, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from reft_core.errors import DatabaseUnavailable, InvalidRequest, explain

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""Tables of all parts. A table added here needs a migration, which the tests compare with it."""

BEFORE_MIGRATIONS = "0001"
"""The revision that a catalog without a recorded revision is at."""

_WRITES = "reft_writes"
_READ_ONLY = "25006"
"""What PostgreSQL calls a change where none can be made: on a standby, or while it is switched."""
_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_TIMEOUT_MS = 10_000
_POOL = {"pool_size": 8, "max_overflow": 32, "pool_timeout": 10, "pool_pre_ping": True}
"""Connections to PostgreSQL: as many threads may ask at once, and it may have been restarted."""


_PATIENCE = {
    "connect_timeout": "5",  # seconds
    "tcp_user_timeout": "10000",  # milliseconds until sent bytes are confirmed
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "2",
}
"""What bounds the wait for a PostgreSQL that has gone without a word, unless the URL says else: as
long, a request waits for its answer, and a thread with it."""


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file."""
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def open_database(url: str) -> Engine:
    """An engine on the database at ``url``, whose tables are the current ones when it returns.

    ``sqlite:///file`` or ``postgresql://user:password@host/name``. Several processes may start
    at once: one migrates, the others wait for it. Of use with :func:`reading` and
    :func:`writing`; to be disposed of by the caller. Raises :class:`InvalidRequest` for a URL or
    a database that is of no use here, :class:`DatabaseUnavailable` if it does not answer.
    """
    engine = _create_engine(_parse(url))
    try:
        _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that sees one state of the database and changes nothing."""
    with _as_unavailable(engine), engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A connection whose changes are on disk when the context ends, or not made at all.

    In SQLite there is one such context at a time in all processes; in PostgreSQL those exclude
    each other that :func:`lock` the same thing.
    """
    with _as_unavailable(engine), engine.execution_options(**{_WRITES: True}).begin() as connection:
        yield connection


def lock(connection: Connection, *things: str) -> None:
    """Wait until no other transaction holds any of ``things``, and hold them until this ends.

    Things are names that the callers agree on. Those locked in one call cannot deadlock.
    """
    if connection.dialect.name == "postgresql":
        for key in sorted({_lock_key(thing) for thing in things}):
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _lock_key(thing: str) -> int:
    """The 64 bits by which PostgreSQL knows a lock."""
    digest = hashlib.sha256(f"reft:{thing}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _parse(url: str) -> URL:
    """The URL with its driver. Errors never repeat it, since it may hold a password."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidRequest(
            "database_url: not a URL, expected sqlite:///file or postgresql://user@host/name",
            field="database_url",
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise InvalidRequest.because(
            "database_url", f"{parsed.drivername}://…", "one of sqlite, postgresql"
        )
    return parsed


def _create_engine(url: URL) -> Engine:
    """The engine on a URL, not connected."""
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        return create_engine(url.set(query=_PATIENCE | url.query), **_POOL)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise InvalidRequest(
            explain("database_url", f"{url.drivername}://…", "reft-serve[postgres] installed"),
            field="database_url",
        ) from None


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    """Prepare one SQLite connection. What waits comes first, since changing the journal locks."""
    connection.isolation_level = None  # transactions begin below, not where the driver likes
    for pragma in (
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction: a writer waits for the others now, and not halfway, where it fails."""
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine) -> None:
    """Bring the tables up to date, in one transaction that keeps other processes waiting."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with writing(engine) as connection:
        lock(connection, "migrations")
        config.attributes["connection"] = connection
        tables = inspect(connection).get_table_names()
        try:
            if "names" in tables and "alembic_version" not in tables:
                command.stamp(config, BEFORE_MIGRATIONS)
            command.upgrade(config, "head")
        except CommandError as error:
            raise InvalidRequest(
                f"database_url: the database was made by a newer release ({error}); "
                "expected one that this release knows",
                field="database_url",
            ) from None


@contextmanager
def _as_unavailable(engine: Engine) -> Iterator[None]:
    """Turn the failures of a database that does not answer, or is a standby, into our own error."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise _unavailable("the database does not answer", error) from error
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _READ_ONLY:
            raise
        engine.dispose()  # its connections: after a fail-over, new ones may lead to the primary
        raise _unavailable("the database takes no changes at the moment", error) from error


def _unavailable(message: str, error: Exception) -> DatabaseUnavailable:
    """``message``, with the driver's own line for operators."""
    reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
    return DatabaseUnavailable(message, reason=reason)

"""The catalog: which names exist, their immutable versions, and which one is current.

A version number is never used twice, not even after its name was deleted, so ``name@3``
either means what it always meant or nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)

from reft_core.spec import AdapterSpec

_metadata = MetaData()

_names = Table(
    "names",
    _metadata,
    Column("name", String(96), primary_key=True),
    Column("current", Integer, nullable=True),  # NULL once deleted
    Column("last_number", Integer, nullable=False),
)
# Deleted names stay, for their numbers; whoever lists names need not step over them.
_alive = Index("names_alive", _names.c.name, sqlite_where=_names.c.current.is_not(None))

_versions = Table(
    "versions",
    _metadata,
    Column("name", String(96), ForeignKey("names.name"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("num_bytes", Integer, nullable=False),
    Column("created_at", Integer, nullable=False),  # seconds since 1970, UTC
    Column("spec", Text, nullable=False),
    UniqueConstraint("name", "digest"),
)


@dataclass(frozen=True)
class Version:
    """One immutable version of a name."""

    name: str
    number: int
    digest: str
    num_bytes: int
    created_at: int
    """Seconds since 1970, UTC."""
    spec: AdapterSpec

    @property
    def resident_bytes(self) -> int:
        """Bytes it takes in memory once it is loaded."""
        return self.spec.resident_bytes(self.num_bytes)

    @property
    def reference(self) -> str:
        """A ``model`` value that means exactly these bytes, whatever becomes current."""
        return f"{self.name}@sha256:{self.digest[:12]}"


_parse_spec = lru_cache(maxsize=4096)(AdapterSpec.model_validate_json)


class Catalog:
    """Names and versions in an SQLite file. Thread-safe; every change is one transaction.

    Write-ahead log with ``synchronous=FULL``: a change that was acknowledged survives a
    power cut.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = create_engine(URL.create("sqlite", database=str(path)))
        event.listen(self._engine, "connect", _set_pragmas)
        _metadata.create_all(self._engine)
        _alive.create(self._engine, checkfirst=True)  # a catalog may be older than it

    def close(self) -> None:
        """Close every connection. The catalog cannot be used afterwards."""
        self._engine.dispose()

    def add(
        self, name: str, digest: str, num_bytes: int, spec: AdapterSpec
    ) -> tuple[Version, bool]:
        """Make ``digest`` the current version of ``name``; True if the version is new."""
        with self._engine.begin() as connection:
            held = connection.execute(select(_names).where(_names.c.name == name)).one_or_none()
            known = self._one(
                connection,
                _select().where(_versions.c.name == name, _versions.c.digest == digest),
            )
            if known is not None:
                if held is not None and held.current != known.number:
                    self._set_current(connection, name, known.number)
                return known, False
            number = 1 if held is None else held.last_number + 1
            version = Version(name, number, digest, num_bytes, int(time.time()), spec)
            if held is None:
                connection.execute(
                    insert(_names).values(name=name, current=version.number, last_number=0)
                )
            connection.execute(
                insert(_versions).values(
                    name=name,
                    number=version.number,
                    digest=digest,
                    num_bytes=num_bytes,
                    created_at=version.created_at,
                    spec=spec.to_json(),
                )
            )
            self._set_current(connection, name, version.number)
            return version, True

    def remove(self, name: str) -> list[Version]:
        """Delete a name with all its versions, and return them; empty if there is none."""
        with self._engine.begin() as connection:
            removed = self._all(connection, _of_name(name))
            connection.execute(delete(_versions).where(_versions.c.name == name))
            connection.execute(update(_names).where(_names.c.name == name).values(current=None))
            return removed

    def current(self, name: str) -> Version | None:
        """The version that a bare ``name`` means."""
        return self._find(_current().where(_names.c.name == name))

    def numbered(self, name: str, number: int) -> Version | None:
        """The version ``name@number``."""
        return self._find(_select().where(_versions.c.name == name, _versions.c.number == number))

    def with_digest(self, name: str, prefix: str) -> list[Version]:
        """Versions of ``name`` whose digest starts with ``prefix`` (hex digits)."""
        with self._engine.connect() as connection:
            return self._all(
                connection, _of_name(name).where(_versions.c.digest.startswith(prefix))
            )

    def versions(self, name: str) -> list[Version]:
        """All versions of ``name``, oldest first."""
        with self._engine.connect() as connection:
            return self._all(connection, _of_name(name))

    def all_current(self, after: str = "", limit: int | None = None) -> list[Version]:
        """The current version of every name, by name: of those ``after`` one, up to ``limit``."""
        page = _current().where(_names.c.name > after).order_by(_names.c.name).limit(limit)
        with self._engine.connect() as connection:
            return self._all(connection, page)

    def names(self, limit: int) -> list[str]:
        """The first ``limit`` names in order."""
        alive = _names.c.current.is_not(None)
        first = select(_names.c.name).where(alive).order_by(_names.c.name).limit(limit)
        with self._engine.connect() as connection:
            return list(connection.scalars(first))

    def digests(self) -> set[str]:
        """Every digest that some version refers to."""
        with self._engine.connect() as connection:
            return set(connection.scalars(select(_versions.c.digest)))

    def refers_to(self, digest: str) -> bool:
        """Whether any version of any name has this digest."""
        query = select(_versions.c.name).where(_versions.c.digest == digest).limit(1)
        with self._engine.connect() as connection:
            return connection.scalar(query) is not None

    def _set_current(self, connection: Connection, name: str, number: int) -> None:
        """Point ``name`` at one of its versions."""
        last = func.max(_names.c.last_number, number)  # SQLite's two-argument max
        connection.execute(
            update(_names).where(_names.c.name == name).values(current=number, last_number=last)
        )

    def _find(self, query: Select[Any]) -> Version | None:
        """The one version ``query`` finds, if it does."""
        with self._engine.connect() as connection:
            return self._one(connection, query)

    @staticmethod
    def _one(connection: Connection, query: Select[Any]) -> Version | None:
        row = connection.execute(query).one_or_none()
        return None if row is None else _to_version(row)

    @staticmethod
    def _all(connection: Connection, query: Select[Any]) -> list[Version]:
        rows: Sequence[Row[Any]] = connection.execute(query).all()
        return [_to_version(row) for row in rows]


def _select() -> Select[Any]:
    """Query of versions; conditions to be added."""
    return select(*_versions.c)


def _of_name(name: str) -> Select[Any]:
    """Query of a name's versions, oldest first."""
    return _select().where(_versions.c.name == name).order_by(_versions.c.number)


def _current() -> Select[Any]:
    """Query of versions that are current."""
    return _select().join(
        _names, (_names.c.name == _versions.c.name) & (_names.c.current == _versions.c.number)
    )


def _to_version(row: Row[Any]) -> Version:
    """The version in a row of the versions table."""
    return Version(
        row.name, row.number, row.digest, row.num_bytes, row.created_at, _parse_spec(row.spec)
    )


def _set_pragmas(connection: Any, _record: Any) -> None:
    """Prepare one SQLite connection."""
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
    ):
        connection.execute(f"PRAGMA {pragma}").close()

"""The table of keys, in the SQL database that the registry uses too."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Row,
    String,
    Table,
    Text,
    insert,
    select,
    update,
)

from server.database import metadata, open_database, reading, writing
from server.keys import secret
from server.keys.key import Key, NewKey
from server.registry.audit import record
from server.settings import Settings

_keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("name", String(96), nullable=False),
    Column("tenant", String(96), nullable=False, index=True),
    Column("kind", String(8), nullable=False),
    Column("models", Text, nullable=False),  # a JSON list
    Column("may_upload", Boolean, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("max_concurrency", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("last_used_at", BigInteger),
)


@contextmanager
def open_store(settings: Settings) -> Iterator[KeyStore]:
    """The keys of the database that the settings name, for a command that needs nothing else."""
    engine = open_database(settings.database)
    try:
        yield KeyStore(engine)
    finally:
        engine.dispose()


class KeyStore:
    """Keys by id. Thread-safe; blocks on the database. Rows stay when a key is revoked.

    Every method may raise :class:`DatabaseUnavailable`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, wanted: NewKey, *, actor: str = "") -> tuple[str, Key]:
        """Make a key for ``actor``. Its text is returned here and never again."""
        text, presented = secret.generate()
        now = int(time.time())
        fields = wanted.model_dump(exclude={"expires_in_s"})
        life_s = wanted.expires_in_s
        key = Key(
            **fields,
            **presented._asdict(),
            created_at=now,
            expires_at=None if life_s is None else now + life_s,
        )
        with writing(self._engine) as connection:
            connection.execute(
                insert(_keys).values(
                    **fields | {"models": json.dumps(key.models)},
                    **presented._asdict(),
                    created_at=key.created_at,
                    expires_at=key.expires_at,
                )
            )
            _record(connection, "create key", key, actor)
        return text, key

    def find(self, key_id: str) -> Key | None:
        """The key with this id, also if it has expired or was revoked."""
        with reading(self._engine) as connection:
            row = connection.execute(select(_keys).where(_keys.c.id == key_id)).one_or_none()
        return None if row is None else _to_key(row)

    def all(self, tenant: str | None = None) -> list[Key]:
        """Every key, of one tenant or of all, oldest first."""
        query = select(_keys).order_by(_keys.c.created_at, _keys.c.id)
        if tenant is not None:
            query = query.where(_keys.c.tenant == tenant)
        with reading(self._engine) as connection:
            return [_to_key(row) for row in connection.execute(query)]

    def revoke(self, key_id: str, tenant: str | None = None, *, actor: str = "") -> Key | None:
        """Revoke a key for good, and return it; None if there is none (of this tenant).

        A key that was revoked before stays as it is.
        """
        mine = [_keys.c.id == key_id]
        if tenant is not None:
            mine.append(_keys.c.tenant == tenant)
        with writing(self._engine) as connection:
            changed = connection.execute(
                update(_keys)
                .where(*mine, _keys.c.revoked_at.is_(None))
                .values(revoked_at=int(time.time()))
            )
            row = connection.execute(select(_keys).where(*mine)).one_or_none()
            key = None if row is None else _to_key(row)
            if key is not None and changed.rowcount:
                _record(connection, "revoke key", key, actor)
        return key

    def touch(self, key_id: str, now: float) -> None:
        """Note that a key was used."""
        with writing(self._engine) as connection:
            connection.execute(
                update(_keys).where(_keys.c.id == key_id).values(last_used_at=int(now))
            )

    def any_ever(self, kind: str | None = None) -> bool:
        """Whether there is a key (of this kind), be it expired or revoked."""
        query = select(_keys.c.id).limit(1)
        if kind is not None:
            query = query.where(_keys.c.kind == kind)
        with reading(self._engine) as connection:
            return connection.scalar(query) is not None

    def any_active(self) -> bool:
        """Whether there is a key that opens anything."""
        now = int(time.time())
        unexpired = _keys.c.expires_at.is_(None) | (_keys.c.expires_at > now)
        query = select(_keys.c.id).where(_keys.c.revoked_at.is_(None), unexpired).limit(1)
        with reading(self._engine) as connection:
            return connection.scalar(query) is not None


def _record(connection: Connection, action: str, key: Key, actor: str) -> None:
    """Note in the audit log what a transaction does to a key."""
    record(connection, action, actor=actor, tenant=key.tenant, name=key.id, detail=key.name)


def _to_key(row: Row[Any]) -> Key:
    """The key in a row."""
    return Key(**dict(row._mapping) | {"models": tuple(json.loads(row.models))})

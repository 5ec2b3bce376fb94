"""The registry's tables. Their history is in ``server/migrations``."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from server.database import metadata

# Ordered by their bytes in every database, so that pages of names are the same in all.
_NAME = String(96).with_variant(String(96, collation="C"), "postgresql")
_ID = BigInteger().with_variant(Integer, "sqlite")  # only that counts up in SQLite

names = Table(
    "names",
    metadata,
    Column("tenant", _NAME, nullable=False),  # "" is shared by all
    Column("name", _NAME, nullable=False),
    Column("current", Integer, nullable=True),  # NULL once deleted
    Column("previous", Integer, nullable=True),  # what was current before
    Column("last_number", Integer, nullable=False),
    Column("pinned", Boolean, nullable=False),
    PrimaryKeyConstraint("tenant", "name"),
)
_alive = names.c.current.is_not(None)
# Deleted names stay, for their numbers; whoever lists names need not step over them.
Index(
    "names_alive",
    names.c.name,
    names.c.tenant,
    sqlite_where=_alive,
    postgresql_where=_alive,
)

versions = Table(
    "versions",
    metadata,
    Column("tenant", _NAME, nullable=False),
    Column("name", _NAME, nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False, index=True),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),  # seconds since 1970, UTC
    Column("method", String(256), nullable=False),  # as in the spec, to be searched by
    Column("base", String(256), nullable=False),
    Column("spec", Text, nullable=False),
    PrimaryKeyConstraint("tenant", "name", "number"),
    ForeignKeyConstraint(["tenant", "name"], ["names.tenant", "names.name"]),
    UniqueConstraint("tenant", "name", "digest"),
)

trash = Table(
    "trash",
    metadata,
    Column("digest", String(64), nullable=False),  # of a file that no version has any more
    Column("since", BigInteger, nullable=False),
    PrimaryKeyConstraint("digest"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", _ID, nullable=False, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(256), nullable=False),
    Column("tenant", _NAME, nullable=False),
    Column("action", String(64), nullable=False),
    Column("name", String(256), nullable=False),
    Column("number", Integer, nullable=True),
    Column("digest", String(64), nullable=True),
    Column("detail", Text, nullable=False),
    PrimaryKeyConstraint("id"),
)
Index("ix_audit_tenant_name", audit.c.tenant, audit.c.name)

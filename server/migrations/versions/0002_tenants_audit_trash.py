"""Names belong to tenants; what was current before; pins; who did what; files to be removed."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # only that counts up in SQLite
# Ordered by their bytes in every database, so that pages of names are the same in all.
_NAME = sa.String(96).with_variant(sa.String(96, collation="C"), "postgresql")
_APPEND_ONLY = "rows of audit are never changed"


def upgrade() -> None:
    """Rebuild names and versions with a tenant in their keys, and make the new tables.

    Rebuilt and not altered: SQLite cannot change a primary key, and one way serves both.
    """
    for table in ("names", "versions"):
        op.execute(f"CREATE TABLE {table}_before AS SELECT * FROM {table}")
    op.drop_table("versions")
    op.drop_table("names")
    _make_names_and_versions()
    op.execute(
        "INSERT INTO names (tenant, name, current, last_number, pinned) "
        "SELECT '', name, current, last_number, false FROM names_before"
    )
    _copy_versions()
    for table in ("versions_before", "names_before"):
        op.drop_table(table)
    op.create_table(
        "trash",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_trash"),
    )
    op.create_table(
        "audit",
        sa.Column("id", _ID, nullable=False, autoincrement=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(256), nullable=False),
        sa.Column("tenant", _NAME, nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("number", sa.Integer, nullable=True),
        sa.Column("digest", sa.String(64), nullable=True),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_tenant_name", "audit", ["tenant", "name"])
    _forbid_changes_of_audit()


def _make_names_and_versions() -> None:
    """Both tables in their new form."""
    op.create_table(
        "names",
        sa.Column("tenant", _NAME, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("current", sa.Integer, nullable=True),
        sa.Column("previous", sa.Integer, nullable=True),
        sa.Column("last_number", sa.Integer, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", name="pk_names"),
    )
    alive = sa.text("current IS NOT NULL")
    op.create_index(
        "names_alive",
        "names",
        ["name", "tenant"],
        sqlite_where=alive,
        postgresql_where=alive,
    )
    op.create_table(
        "versions",
        sa.Column("tenant", _NAME, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("method", sa.String(256), nullable=False),
        sa.Column("base", sa.String(256), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", "number", name="pk_versions"),
        sa.ForeignKeyConstraint(
            ["tenant", "name"], ["names.tenant", "names.name"], name="fk_versions_tenant_names"
        ),
        sa.UniqueConstraint("tenant", "name", "digest", name="uq_versions_tenant_name_digest"),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])


def _copy_versions() -> None:
    """Fill in the method and base of every version, which its spec says."""
    connection = op.get_bind()
    versions = sa.table(
        "versions",
        *map(sa.column, ("tenant", "name", "number", "digest", "num_bytes", "created_at")),
        *map(sa.column, ("method", "base", "spec")),
    )
    rows = connection.execute(
        sa.text("SELECT name, number, digest, num_bytes, created_at, spec FROM versions_before")
    )
    while batch := rows.fetchmany(1000):
        values = []
        for row in batch:
            spec = json.loads(row.spec)
            method, base = spec["method"], spec["base"]["name"]
            values.append({**row._mapping, "tenant": "", "method": method, "base": base})
        connection.execute(versions.insert(), values)


def _forbid_changes_of_audit() -> None:
    """Have the database itself refuse to change or delete what the audit log says."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_change_of_audit() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{_APPEND_ONLY}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
            "EXECUTE FUNCTION refuse_change_of_audit()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_no_{change.lower()} BEFORE {change} ON audit "
            f"BEGIN SELECT RAISE(ABORT, '{_APPEND_ONLY}'); END"
        )

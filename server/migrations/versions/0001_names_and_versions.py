"""Names and their versions, as releases made them that had no migrations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "names",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("current", sa.Integer, nullable=True),
        sa.Column("last_number", sa.Integer, nullable=False),
    )
    op.create_index("names_alive", "names", ["name"], sqlite_where=sa.text("current IS NOT NULL"))
    op.create_table(
        "versions",
        sa.Column("name", sa.String(96), sa.ForeignKey("names.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.UniqueConstraint("name", "digest"),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])

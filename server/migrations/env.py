"""What Alembic runs for every command: migrations on the connection that it was given."""

from __future__ import annotations

from alembic import context

from server.database import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()

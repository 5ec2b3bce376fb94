"""The history of the database's tables, run by :mod:`server.database` at every start."""

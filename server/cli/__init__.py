"""The ``reft`` command, a module for each of its commands."""

"""``python -m server``: the same as the ``reft`` command."""

from server.cli.main import main

main()

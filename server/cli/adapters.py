"""``reft adapter``: its commands on files, and those that manage a running server's adapters."""

from __future__ import annotations

import typer

from server.cli.convert import convert, export
from server.cli.diff import diff
from server.cli.inspect import describe, inspect
from server.cli.mix import mix
from server.cli.push import push
from server.cli.remote import list_, pin, promote, pull, rm, rollback, show, unpin
from server.cli.steer import steer

adapters_app = typer.Typer(
    help="Inspect, convert and mix adapter files; upload and manage a server's adapters.",
    no_args_is_help=True,
)

adapters_app.command()(inspect)
adapters_app.command()(describe)
adapters_app.command()(diff)
adapters_app.command()(convert)
adapters_app.command()(export)
adapters_app.command()(mix)
adapters_app.command()(steer)
adapters_app.command()(push)
adapters_app.command("list")(list_)
adapters_app.command()(show)
adapters_app.command()(promote)
adapters_app.command()(rollback)
adapters_app.command()(pin)
adapters_app.command()(unpin)
adapters_app.command()(pull)
adapters_app.command()(rm)

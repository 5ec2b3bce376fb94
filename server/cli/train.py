"""``reft train``: an adapter from data, and with ``--serve`` straight to a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from server.cli.errors import one_line_errors
from server.cli.options import Key, OptionalAdminKey, Tenant
from server.cli.text import printable

if TYPE_CHECKING:
    from server.cli.teaching import Taught
    from trainer.train import TrainResult


def train(
    target: Annotated[
        str, typer.Argument(help="YAML file; or data: a file, a folder or a hub's data set")
    ] = "",
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, or --key value; they win over the file's")
    ] = None,
    help_settings: Annotated[
        bool, typer.Option("--help-settings", help="List all settings and presets")
    ] = False,
    serve: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Upload it to this server, and ask it something there"),
    ] = None,
    key: OptionalAdminKey = None,
    user_key: Key = None,
    tenant: Tenant = "",
) -> None:
    """Train an adapter.

    With --serve the server, its key and its base model are looked at before anything is trained.
    """
    with one_line_errors():
        from trainer.cli import list_settings, train_command

        if help_settings:
            list_settings()
        elif not target:
            raise typer.BadParameter("a YAML file, or data", param_hint="target")
        elif serve is None:
            train_command(target, settings or [])
        elif key is None:
            raise typer.BadParameter("the server's admin key", param_hint="--key")
        else:
            from server.cli.teaching import Teaching

            teaching = Teaching(serve, key, user_key, tenant)
            result = train_command(target, settings or [], teaching.check)
            _print(teaching.teach(result), result)


def _print(taught: Taught, result: TrainResult) -> None:
    """What the server has now, and what it says."""
    lines = [("served", f"{taught.reference} at {taught.url}")]
    if taught.answers is None:
        lines.append(("not asked", taught.reason))
    else:
        lines += [("asked", taught.question), ("expected", taught.expected)]
        lines += list(taught.answers.items())
    out = Console()
    for name, value in lines:
        shown = " ".join(printable(value).split())
        out.print(f"{name:<10} {shown}", markup=False, highlight=False, soft_wrap=True)

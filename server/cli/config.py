"""``reft config``: what the settings are, where they came from, and a file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.cli.errors import console, one_line_errors
from server.cli.options import AsJson, Force
from server.cli.settings import with_settings_and
from server.cli.text import print_json

config_app = typer.Typer(
    help="Show the server's settings, or begin a file of them.", no_args_is_help=True
)

_STYLES = {"flag": "green", "environment": "cyan", "file": "yellow", "default": "dim"}


@config_app.command()
@with_settings_and(as_json=(AsJson, False))
def show(config: Path | None, flags: dict[str, Any], *, as_json: bool) -> None:
    """Print the settings that `reft serve` would have here, and the source of each.

    It takes the same flags. Secrets are not shown, only whether they are set.
    """
    with one_line_errors():
        from server.settings.sources import load_settings

        sourced = load_settings(config, flags)
        for warning in sourced.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
        if as_json:
            document = {
                field.name: {"value": field.plain(value), "source": source}
                for field, value, source in sourced.rows()
            }
            print_json(document)
            return
        table = Table("setting", "value", "source")
        for field, value, source in sourced.rows():
            shown = escape(field.shown(value))
            table.add_row(field.name, shown, source, style=_STYLES[source])
        Console().print(table)


@config_app.command()
def init(
    path: Annotated[Path, typer.Argument(help="A new file: .yaml or .toml")] = Path("reft.yaml"),
    force: Force = False,
) -> None:
    """Write a file with every setting, its default and its range, all commented out."""
    with one_line_errors():
        from server.settings.file import check_new, example

        check_new(path, force=force)
        path.write_text(example(path.suffix), encoding="utf-8")
        typer.echo(f"{path} written; start with: reft serve --config {path}")

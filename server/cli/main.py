"""The ``reft`` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import typer

from server.cli.adapters import adapters_app
from server.cli.bench import bench
from server.cli.chat import chat
from server.cli.compare import compare
from server.cli.config import config_app
from server.cli.errors import OneLineGroup
from server.cli.eval import evaluate
from server.cli.keys import keys_app
from server.cli.methods import methods
from server.cli.registry import registry_app
from server.cli.runs import runs_app
from server.cli.serve import demo, serve
from server.cli.sweep import sweep
from server.cli.train import train

app = typer.Typer(
    name="reft",
    help="Train and serve ReFT adapters over one frozen language model.",
    cls=OneLineGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(demo)
app.command()(chat)
app.command()(bench)
app.command("eval")(evaluate)
app.add_typer(adapters_app, name="adapter")
app.add_typer(keys_app, name="key")
app.add_typer(registry_app, name="registry")
app.add_typer(config_app, name="config")
app.add_typer(runs_app, name="runs")
app.command()(methods)
app.command(
    epilog="Settings: reft train --help-settings", context_settings={"ignore_unknown_options": True}
)(train)
app.command()(compare)
app.command()(sweep)


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def version() -> None:
    """Print the version."""
    from reft_core import __version__

    typer.echo(__version__)

"""``reft registry``: the catalog and the store of adapter files, without a server."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.errors import one_line_errors
from server.cli.options import DataDir
from server.cli.settings import Config, settings_of_data

registry_app = typer.Typer(
    help="Check and repair the catalog and the store of adapter files.", no_args_is_help=True
)


@registry_app.callback()
def registry() -> None:
    """Check and repair the catalog and the store of adapter files."""


@registry_app.command()
def check(
    repair: Annotated[bool, typer.Option(help="Repair what can be")] = False,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Compare every version with its file, and look for files that belong to none.

    Where database and files are is taken from the settings that the server has: its file and its
    REFT_ variables. May run beside servers. The exit status is 1 if something was found and not
    repaired.
    """
    with one_line_errors():
        from server.registry import Catalog, open_store
        from server.registry.check import RegistryCheck

        settings = settings_of_data(config, data_dir)
        catalog = Catalog.at(settings.database)
        try:
            checking = RegistryCheck(catalog, open_store(settings))
            num_found = 0
            for finding in checking.run(repair=repair):
                num_found += finding.kind != "foreign file"
                done = finding.repair if repair else f"--repair: {finding.repair}"
                typer.echo(f"{finding.kind}: {finding.what}; {done}")
        finally:
            catalog.close()
    found = f"{num_found} {'repaired' if repair else 'found'}"
    typer.echo(f"{checking.num_versions} versions checked, {found}")
    raise typer.Exit(int(num_found > 0 and not repair))

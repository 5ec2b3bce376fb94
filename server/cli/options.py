"""Options that mean the same in every command that has them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Url = Annotated[str, typer.Option(envvar="REFT_URL", help="The server")]
Key = Annotated[str | None, typer.Option(envvar="REFT_API_KEY", help="Its key")]
_ADMIN_KEY = typer.Option("--key", envvar="REFT_ADMIN_KEY", help="The server's admin key")
AdminKey = Annotated[str, _ADMIN_KEY]
OptionalAdminKey = Annotated[str | None, _ADMIN_KEY]
Tenant = Annotated[str, typer.Option(envvar="REFT_TENANT", help="Whose name; empty: shared by all")]
DataDir = Annotated[
    Path | None, typer.Option(help="Where the server keeps its data; as for reft serve")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file that is there")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, on standard output")]

TrainConfigFile = Annotated[Path, typer.Argument(help="YAML file of a training")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value pairs that replace the file's")
]
Steps = Annotated[int | None, typer.Option(help="of every training")]
TrainRows = Annotated[int | None, typer.Option(help="drawn of the training file")]
ValidRows = Annotated[int | None, typer.Option(help="drawn of the validation file")]


def given(**flags: object) -> dict[str, Any]:
    """Those flags that were given."""
    return {name: value for name, value in flags.items() if value is not None}


def command_line() -> str:
    """The command as it was typed, for what it leaves to say how it was made."""
    return shlex.join(["reft", *sys.argv[1:]])

"""Options that mean the same in every command that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[str, typer.Option(envvar="REFT_URL", help="The server")]
Key = Annotated[str | None, typer.Option(envvar="REFT_API_KEY", help="Its key")]
AdminKey = Annotated[str, typer.Option("--key", envvar="REFT_ADMIN_KEY", help="Its admin key")]
Tenant = Annotated[str, typer.Option(envvar="REFT_TENANT", help="Whose name; empty: shared by all")]
DataDir = Annotated[
    Path | None, typer.Option(help="Where the server keeps its data; as for reft serve")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, on standard output")]

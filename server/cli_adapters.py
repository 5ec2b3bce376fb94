"""``reft adapter``: its commands on files, and those that manage a running server's adapters."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reft_core.errors import ReftError
from server.cli_convert import convert, export
from server.cli_diff import diff
from server.cli_errors import one_line_errors
from server.cli_inspect import describe, inspect
from server.cli_mix import mix
from server.cli_steer import steer

adapters_app = typer.Typer(
    help="Inspect, convert, mix, upload, list and delete adapters.", no_args_is_help=True
)

Url = Annotated[str, typer.Option(envvar="REFT_URL", help="The server")]
Key = Annotated[str, typer.Option(envvar="REFT_ADMIN_KEY", help="Its admin key")]
_LOCAL = "http://127.0.0.1:8000"
_TIMEOUT_S = 60


adapters_app.command()(inspect)
adapters_app.command()(describe)
adapters_app.command()(diff)
adapters_app.command()(convert)
adapters_app.command()(export)
adapters_app.command()(mix)
adapters_app.command()(steer)


@adapters_app.command()
def push(
    file: Annotated[Path, typer.Argument(help="An adapter file")],
    key: Key,
    name: Annotated[str | None, typer.Option(help="Served under; default: its own name")] = None,
    url: Url = _LOCAL,
) -> None:
    """Upload an adapter; it replaces what its name meant."""
    with one_line_errors():
        from reft_core.adapter import read_adapter

        name = name or read_adapter(file).spec.name
        answer = _call(url, key, "POST", f"/{urllib.parse.quote(name, safe='')}", file.read_bytes())
        state = "uploaded" if answer["created"] else "was there already"
        typer.echo(f"{answer['name']} version {answer['version']} {state} ({answer['digest']})")


@adapters_app.command("list")
def list_(key: Key, url: Url = _LOCAL) -> None:
    """List the adapters of a server."""
    with one_line_errors():
        table = Table("name", "version", "digest", "bytes", "in use by")
        for card in _call(url, key, "GET", "")["data"]:
            users = "not loaded" if card["num_users"] is None else str(card["num_users"])
            table.add_row(
                card["name"],
                str(card["version"]),
                card["digest"][:12],
                f"{card['num_bytes']:,}",
                users,
            )
        Console().print(table)


@adapters_app.command()
def rm(
    name: Annotated[str, typer.Argument(help="The adapter")], key: Key, url: Url = _LOCAL
) -> None:
    """Delete an adapter with all its versions. Requests that use it finish."""
    with one_line_errors():
        answer = _call(url, key, "DELETE", f"/{urllib.parse.quote(name, safe='')}")
        typer.echo(f"{name} deleted, versions {answer['deleted_versions']}")


def _call(url: str, key: str, method: str, path: str, body: bytes | None = None) -> Any:
    """The JSON answer of one admin route. Raises :class:`ReftError` with the server's reason."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ReftError(f"url: got {url!r}, expected one that begins with http:// or https://")
    request = urllib.request.Request(
        f"{url.rstrip('/')}/admin/adapters{path}",
        data=body,
        method=method,
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/octet-stream"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise ReftError(_reason(error)) from None
    except urllib.error.URLError as error:
        raise ReftError(f"{url}: {error.reason}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server said, or else its status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url}: HTTP {error.code}"

"""``reft adapter``: look at adapter files, and manage those of a running server."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reft_core.errors import ReftError
from server.cli_errors import one_line_errors

adapters_app = typer.Typer(help="Inspect, upload, list and delete adapters.", no_args_is_help=True)

Url = Annotated[str, typer.Option(envvar="REFT_URL", help="The server")]
Key = Annotated[str, typer.Option(envvar="REFT_ADMIN_KEY", help="Its admin key")]
_LOCAL = "http://127.0.0.1:8000"
_TIMEOUT_S = 60


@adapters_app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An adapter file")]) -> None:
    """Show what an adapter file says about itself. Checks all of it; runs none of it."""
    with one_line_errors():
        from reft_core.adapter import read_adapter

        adapter = read_adapter(file)
        spec = adapter.spec
        share = f"{spec.num_parameters:,}"
        sites = "; ".join(
            f"{name}: rank {site.rank}, layers {','.join(map(str, site.layers))}"
            for name, site in spec.sites.items()
        )
        rows = {
            "name": spec.name,
            "description": spec.description,
            "licence": spec.licence,
            "digest": adapter.digest,
            "bytes": f"{adapter.num_bytes:,}",
            "parameters": share,
            "base model": f"{spec.base.name} ({spec.base.architecture}, "
            f"{spec.base.num_layers} layers of {spec.base.hidden_size})",
            "method": spec.method,
            "positions": f"{spec.positions.rule} ({'tied' if spec.positions.tied else 'untied'})",
            "sites": sites,
            "strength": str(spec.strength),
            "template": "its own" if spec.template else "the base model's",
            "metrics": ", ".join(f"{k} {v:.4g}" for k, v in spec.training.metrics.items()),
        }
        table = Table.grid(padding=(0, 2))
        for key, value in rows.items():
            if value:
                table.add_row(key, escape(_printable(value)))
        Console().print(table)


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


def _printable(text: str) -> str:
    """``text`` from a stranger's file without characters that steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)

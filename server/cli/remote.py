"""``reft adapter list``, ``show`` and the like: the adapters of a running server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from reft_core.errors import InvalidRequest, ReftError
from server.cli.errors import one_line_errors
from server.cli.files import check_free
from server.cli.options import AdminKey, AsJson, Force, Tenant, Url
from server.cli.text import print_json, print_table
from server.client.address import DEFAULT_URL, adapter_path

if TYPE_CHECKING:
    from server.client.admin import AdminClient

Name = Annotated[str, typer.Argument(help="The adapter")]
Reference = Annotated[str, typer.Argument(help="name, name@3 or name@sha256:…")]
_PAGE = 200


def list_(
    key: AdminKey,
    url: Url = DEFAULT_URL,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant; default: of all")] = None,
    prefix: Annotated[str, typer.Option(help="Names that begin so")] = "",
    method: Annotated[str | None, typer.Option(help="Such as loreft")] = None,
    base: Annotated[str | None, typer.Option(help="Name of the base model")] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters of a server."""
    with one_line_errors():
        admit = {"tenant": tenant, "prefix": prefix or None, "method": method, "base": base}
        cards = _cards(_client(url, key), admit)
        if as_json:
            print_json(list(cards))
            return
        table = Table("name", "version", "method", "digest", "bytes", "in use by")
        for card in cards:
            owner = f"{card['tenant']}/" if card["tenant"] else ""
            table.add_row(
                f"{owner}{card['name']}",
                str(card["version"]),
                card["method"],
                card["digest"][:12],
                f"{card['num_bytes']:,}",
                _users(card),
            )
        print_table(table)


def show(
    name: Reference,
    key: AdminKey,
    url: Url = DEFAULT_URL,
    tenant: Tenant = "",
    as_json: AsJson = False,
) -> None:
    """Show the versions of an adapter, and which is current."""
    with one_line_errors():
        answer = _client(url, key, tenant).call("GET", adapter_path(name))
        if as_json:
            print_json(answer)
            return
        table = Table("version", "", "digest", "bytes", "in use by")
        for card in answer["versions"]:
            notes = {answer["current"]: "current", answer["previous"]: "previous"}
            table.add_row(
                str(card["version"]),
                notes.get(card["version"], ""),
                card["digest"],
                f"{card['num_bytes']:,}",
                _users(card),
            )
        spec = answer["spec"]
        typer.echo(f"{answer['name']}: {spec['method']} on {spec['base']['name']}")
        if answer["pinned"]:
            typer.echo("pinned: stays loaded")
        print_table(table)


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="Its number", min=1)],
    key: AdminKey,
    url: Url = DEFAULT_URL,
    tenant: Tenant = "",
) -> None:
    """Make one version what the name means."""
    _change("POST", adapter_path(name, f"/versions/{version}/promote"), url, key, tenant)


def rollback(name: Name, key: AdminKey, url: Url = DEFAULT_URL, tenant: Tenant = "") -> None:
    """Make current again what was before."""
    _change("POST", adapter_path(name, "/rollback"), url, key, tenant)


def pin(name: Name, key: AdminKey, url: Url = DEFAULT_URL, tenant: Tenant = "") -> None:
    """Keep an adapter loaded, whatever else is asked for."""
    _change("PUT", adapter_path(name, "/pin"), url, key, tenant, "; it stays loaded")


def unpin(name: Name, key: AdminKey, url: Url = DEFAULT_URL, tenant: Tenant = "") -> None:
    """Keep an adapter loaded no longer than others."""
    _change("DELETE", adapter_path(name, "/pin"), url, key, tenant, "; no longer pinned")


def pull(
    name: Reference,
    key: AdminKey,
    out: Annotated[Path | None, typer.Option(help="Default: <name>.safetensors")] = None,
    force: Force = False,
    url: Url = DEFAULT_URL,
    tenant: Tenant = "",
) -> None:
    """Download an adapter file, exactly as it was uploaded."""
    with one_line_errors():
        out = out or Path(f"{name.partition('@')[0]}.safetensors")
        check_free(out, force)
        scratch = out.with_name(f".{out.name}.part")
        try:
            digest = _client(url, key, tenant).download(adapter_path(name, "/file"), scratch)
            with scratch.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise ReftError(f"{name}: got bytes of SHA-256 {found}, expected {digest}")
            os.replace(scratch, out)
        finally:
            scratch.unlink(missing_ok=True)
        typer.echo(f"{out} ({digest})")


def rm(
    name: Annotated[str, typer.Argument(help="name, or name@3 for one version")],
    key: AdminKey,
    url: Url = DEFAULT_URL,
    tenant: Tenant = "",
) -> None:
    """Delete an adapter with all its versions, or one version. Requests that use it finish."""
    with one_line_errors():
        plain, at, number = name.partition("@")
        if at and not number.isdigit():
            raise InvalidRequest.because("name", name, "name, or name@ and a number")
        path = adapter_path(plain, f"/versions/{number}" if at else "")
        answer = _client(url, key, tenant).call("DELETE", path)
        deleted = ", ".join(map(str, answer["deleted_versions"]))
        typer.echo(f"{plain} deleted: version {deleted}")


def _cards(client: AdminClient, admit: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    """The cards of all adapters that pass the filters, page after page."""
    after: dict[str, str] = {}
    more = True
    while more:
        page = client.call("GET", "/admin/adapters", query={**admit, **after, "limit": _PAGE})
        for card in page["data"]:
            yield card
            after = {"after": card["name"], "after_tenant": card["tenant"]}
        more = page["has_more"]


def _users(card: dict[str, Any]) -> str:
    """How many use it, where the server can tell."""
    return "none seen" if card["num_users"] is None else str(card["num_users"])


def _change(method: str, path: str, url: str, key: str, tenant: str, more: str = "") -> None:
    """Make a change and say what the name means now, and ``more``."""
    with one_line_errors():
        card = _client(url, key, tenant).call(method, path)
        typer.echo(f"{card['name']} is version {card['version']} ({card['digest']}){more}")


def _client(url: str, key: str, tenant: str = "") -> AdminClient:
    from server.client.admin import AdminClient

    return AdminClient(url, key, tenant)

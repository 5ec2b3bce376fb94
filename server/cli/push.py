"""``reft adapter push``: an adapter file to a running server, or to a hub."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import one_line_errors
from server.cli.options import OptionalAdminKey, Tenant, Url
from server.cli.transfer import shown_progress
from server.client.address import DEFAULT_URL, adapter_path

if TYPE_CHECKING:
    from server.client.admin import AdminClient


_OF_SERVER = ("name", "signature", "key", "url", "tenant")
_OF_HUB = ("private", "revision", "base_model")


def push(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="An adapter file")],
    key: OptionalAdminKey = None,
    name: Annotated[str | None, typer.Option(help="Served under; default: its own name")] = None,
    signature: Annotated[
        Path | None, typer.Option(help="Its signature file by OpenSSF model-signing")
    ] = None,
    url: Url = DEFAULT_URL,
    tenant: Tenant = "",
    hub: Annotated[
        str | None, typer.Option(help="OWNER/NAME: to this repository of a hub, and to no server")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the hub's repository private, if it is new")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch of the hub's repository")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base's id on the hub, if the adapter names another")
    ] = None,
) -> None:
    """Upload an adapter to a server, where it replaces what its name meant, or to a hub.

    To a hub with its model card and report, by the token that `hf auth login` keeps or HF_TOKEN
    holds; HF_ENDPOINT is another hub.
    """
    refuse_without_use(context, _OF_SERVER if hub is not None else _OF_HUB, hub)
    with one_line_errors():
        if hub is not None:
            from server.client.hub import push_to_hub

            typer.echo(push_to_hub(file, hub, private, revision, base_model))
            return
        if key is None:
            raise typer.BadParameter("the server's admin key, or --hub", param_hint="--key")
        from server.client.admin import AdminClient

        answer = upload(AdminClient(url, key, tenant), file, name, signature)
        state = "uploaded" if answer["created"] else "was there already"
        typer.echo(f"{answer['name']} version {answer['version']} {state} ({answer['digest']})")


def refuse_without_use(context: typer.Context, names: Iterable[str], hub: str | None) -> None:
    """Raise :class:`typer.BadParameter` for one of these options that was typed; what stands in the
    environment is for other commands too.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            reason = "has no use with --hub" if hub is not None else "has a use only with --hub"
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"got {context.params[name]!r}, but {reason}", param_hint=flag)


def upload(
    client: AdminClient, file: Path, name: str | None = None, signature: Path | None = None
) -> dict[str, Any]:
    """The server's answer to ``file`` under ``name``, by default its own. Raises ReftError."""
    from reft_core.adapter import read_adapter

    adapter = read_adapter(file)
    headers = {"X-Expected-SHA256": adapter.digest}
    if signature is not None:
        headers["X-Model-Signature"] = base64.b64encode(signature.read_bytes()).decode()
    with shown_progress(file) as on_sent:
        return client.upload(adapter_path(name or adapter.spec.name), file, headers, on_sent)

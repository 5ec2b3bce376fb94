"""``reft key``: make, list and revoke keys, in the database itself or through a running server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from reft_core.errors import ReftError, explain
from server.cli.errors import console, one_line_errors
from server.cli.options import AsJson, DataDir, OptionalAdminKey
from server.cli.settings import Config, settings_of_data
from server.cli.text import print_json, print_table, safe

if TYPE_CHECKING:
    from server.keys import KeyStore, NewKey
    from server.protocol.keys import KeyCard

keys_app = typer.Typer(
    help="Make, list and revoke keys: in the database that the settings name, or with --url "
    "through a running server.",
    no_args_is_help=True,
)

Url = Annotated[str | None, typer.Option(help="A running server; default: the database itself")]
_DAY_S = 86400


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what will use it")],
    tenant: Annotated[str, typer.Option(help="Whose adapters it sees beside the shared")] = "",
    admin: Annotated[bool, typer.Option("--admin", help="A key of /admin, not of /v1")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A name it may use; * stands for any characters; repeatable"),
    ] = None,
    may_upload: Annotated[
        bool, typer.Option("--may-upload", help="It may also manage its tenant's adapters")
    ] = False,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Default: the server's; 0: no limit")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Default: the server's; 0: no limit")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests at once. Default: the server's; 0: no limit")
    ] = None,
    expires_in_days: Annotated[float | None, typer.Option(help="Default: never")] = None,
    url: Url = None,
    key: OptionalAdminKey = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Make a key and print it, once, on standard output."""
    with one_line_errors():
        from server.keys import NewKey

        wanted = NewKey(
            name=name,
            tenant=tenant,
            kind="admin" if admin else "user",
            models=tuple(model) if model else ("*",),
            may_upload=may_upload,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_concurrency=max_concurrency,
            expires_in_s=None if expires_in_days is None else round(expires_in_days * _DAY_S),
        )
        text, card, place = _create(wanted, url, key, data_dir, config)
        owner = f"tenant {card.tenant}" if card.tenant else "no tenant"
        console.print(
            f"{card.kind} key {card.id} of {owner}, in {place}; it is not shown again:",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        typer.echo(text)


@keys_app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant")] = None,
    url: Url = None,
    key: OptionalAdminKey = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """List keys, also those that expired or were revoked."""
    with one_line_errors():
        cards = _cards(tenant, url, key, data_dir, config)
        if as_json:
            print_json([card.model_dump(mode="json") for card in cards])
            return
        table = Table(
            Column("id", no_wrap=True),
            "name",
            "tenant",
            "kind",
            "state",
            "models",
            "last used",
            "expires",
        )
        for card in cards:
            models = " ".join(card.models) + (" (may upload)" if card.may_upload else "")
            table.add_row(
                card.id,
                safe(card.name),
                card.tenant or "-",
                card.kind,
                card.state,
                safe(models),
                _shown_time(card.last_used_at),
                _shown_time(card.expires_at),
            )
        print_table(table)


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id: the 16 digits in the key, or the list")],
    url: Url = None,
    key: OptionalAdminKey = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Revoke a key for good. Servers notice within REFT_KEY_CACHE_S seconds."""
    with one_line_errors():
        if url is not None:
            _call(url, key, "DELETE", _checked_id(key_id))
        else:
            with _store(config, data_dir) as store:
                if store.revoke(_checked_id(key_id)) is None:
                    raise ReftError(explain("key_id", key_id, "an id that 'reft key list' shows"))
        typer.echo(f"{key_id} revoked")


def _create(
    wanted: NewKey, url: str | None, key: str | None, data_dir: Path | None, config: Path | None
) -> tuple[str, KeyCard, str]:
    """The new key's text and card, and where it was put."""
    from server.keys.store import open_store
    from server.protocol.keys import CreatedKey, KeyCard

    if url is not None:
        body = wanted.model_dump(mode="json")
        made = CreatedKey.model_validate(_call(url, key, "POST", json=body))
        return made.key, made, url
    settings = settings_of_data(config, data_dir, may_be_new=True)
    place = str(settings.catalog_file) if settings.database_url is None else "the database"
    with open_store(settings) as store:
        text, stored = store.create(wanted)
        return text, KeyCard.of(stored), place


def _cards(
    tenant: str | None, url: str | None, key: str | None, data_dir: Path | None, config: Path | None
) -> list[KeyCard]:
    """The cards of all keys, or of a tenant's."""
    from server.protocol.keys import KeyCard, KeyList

    if url is not None:
        return KeyList.model_validate(_call(url, key, "GET", query={"tenant": tenant})).data
    with _store(config, data_dir) as store:
        return [KeyCard.of(stored) for stored in store.all(tenant)]


@contextmanager
def _store(config: Path | None, data_dir: Path | None) -> Iterator[KeyStore]:
    """The table of keys of the settings' database, which has to be there."""
    from server.keys.store import open_store

    with open_store(settings_of_data(config, data_dir)) as store:
        yield store


def _checked_id(key_id: str) -> str:
    """The id, which goes into a path. Raises :class:`ReftError`; a whole key is never repeated."""
    if len(key_id) != 16 or not key_id.isalnum():
        raise ReftError(f"key_id: got {len(key_id)} characters, expected 16 hex digits")
    return key_id


def _shown_time(seconds: int | None) -> str:
    """A time for people, UTC."""
    if seconds is None:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _call(url: str, key: str | None, method: str, key_id: str = "", **asked: Any) -> Any:
    """The answer of ``/admin/keys``. Raises :class:`ReftError`."""
    from server.client.admin import AdminClient

    if key is None:
        raise ReftError("key: missing, but --url needs an admin key; set REFT_ADMIN_KEY")
    path = f"/admin/keys/{key_id}" if key_id else "/admin/keys"
    return AdminClient(url, key).call(method, path, **asked)

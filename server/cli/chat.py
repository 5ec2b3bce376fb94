"""``reft chat``: talk to models and adapters, on a running server or one of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from reft_core.errors import InvalidRequest
from server.cli.errors import console, one_line_errors
from server.cli.options import Key

if TYPE_CHECKING:
    from server.client.chat import Chat

_OWN = "Without --url: the server it starts"
_HISTORY = "chat-history"


def chat(
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Ask this and end; in a pipe: what comes in"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Who answers: adapter, adapter@version. Default: the base")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="A further model, side by side; repeatable")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    strength: Annotated[float | None, typer.Option(help="Scales what adapters do")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Default: what the context allows")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With one message: what was said, as JSON")
    ] = False,
    url: Annotated[
        str | None, typer.Option(envvar="REFT_URL", help="A running server; default: starts one")
    ] = None,
    key: Key = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for a server")] = 600.0,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id, folder, or 'demo' (the default)", rich_help_panel=_OWN),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Adapter file or folder; repeatable. Default with 'demo': the examples",
            rich_help_panel=_OWN,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Adapters kept from before. Default: none", rich_help_panel=_OWN),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", envvar="REFT_CONFIG", help="Settings file", rich_help_panel=_OWN
        ),
    ] = None,
) -> None:
    """Chat with a model and its adapters; `/help` lists what can be said between messages.

    With --message, or in a pipe, it asks once and prints the answer.
    """
    with one_line_errors():
        text = _given_message(message)
        if as_json and text is None:
            raise InvalidRequest.because("json", True, "one message, from --message or a pipe")
        models = [name for name in (model, *(compare or [])) if name is not None]
        with ExitStack() as stack:
            if url is None:
                flags = _flags(model=base, adapters=adapter, data_dir=data_dir)
                url, key = stack.enter_context(_own_server(config, flags, key))
            from server.client.chat import Chat
            from server.client.connection import Client
            from server.client.conversation import Conversation
            from server.client.screen import Screen

            conversation = Conversation(
                (),
                system=system,
                strength=strength,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )
            out = Console(file=sys.stderr) if as_json else Console()
            client = stack.enter_context(Client(url, key, timeout))
            talk = Chat(client, conversation, Screen(out, console))
            if compare and model is None:
                models.insert(0, "base")
            talk.begin(*models)
            _run(talk, text, as_json=as_json)


def _run(talk: Chat, text: str | None, *, as_json: bool) -> None:
    """Ask once, or begin to converse."""
    if text is None:
        from server.client.prompt import converse

        talk.screen.note("Ctrl-C stops an answer, Ctrl-D ends; /help lists commands")
        converse(talk, Path(typer.get_app_dir("reft")) / _HISTORY)
        return
    answer = talk.ask(text)
    if as_json:
        typer.echo(talk.conversation.document())
    if answer.stopped:
        raise typer.Exit(130)


def _given_message(message: str | None) -> str | None:
    """The one message to ask; None where a person is there to type. Raises InvalidRequest."""
    if message is None and sys.stdin.isatty():
        return None
    text = sys.stdin.read() if message is None else message
    if not text.strip():
        raise InvalidRequest.because(
            "message", text, "some text, with --message or on standard input"
        )
    return text


def _flags(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value not in (None, [])}


@contextmanager
def _own_server(
    config: Path | None, flags: dict[str, Any], key: str | None
) -> Iterator[tuple[str, str | None]]:
    """A server in this process, on a port that is free: its URL and key."""
    from server.cli.demo import EXAMPLES
    from server.cli.settings import load_with_flags
    from server.client.embedded import embedded_server

    with ExitStack() as stack:
        settings = load_with_flags(config, flags | {"host": "127.0.0.1", "port": 0})
        changes: dict[str, Any] = {}
        given = settings.model_fields_set
        if "data_dir" not in given:
            changes["data_dir"] = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if settings.model == "demo" and "adapters" not in given:
            changes["adapters"] = tuple(sorted(EXAMPLES.glob("*/*.safetensors")))
        if settings.api_key is not None:
            key = settings.api_key.get_secret_value()
        settings = settings.model_copy(update=changes)
        console.print(
            f"Starting a server for {settings.model!r} (--url asks a running one)",
            style="dim",
            markup=False,
            highlight=False,
        )
        yield stack.enter_context(embedded_server(settings)), key

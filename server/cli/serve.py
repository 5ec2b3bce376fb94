"""``reft serve`` and ``reft demo``: a model, its adapters, and a port."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel

from reft_core.errors import InvalidRequest
from server.cli.errors import console, one_line_errors
from server.cli.settings import load_with_flags, with_settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.settings import Settings


@with_settings
def serve(config: Path | None, flags: dict[str, Any]) -> None:
    """Serve a base model and its adapters over HTTP.

    Every setting is a flag here, a REFT_<NAME> variable, or a line of the file that --config
    names, in this order of precedence; keys and URLs with passwords are no flags, since a command
    line is visible to other users. `reft config show` prints what results and where it came from.
    """
    with one_line_errors():
        run_server(load_with_flags(config, flags))


def demo(
    model: Annotated[str, typer.Option(help="Hub id, folder, or 'demo'")] = "demo",
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    data_dir: Annotated[Path, typer.Option(help="Where adapters are kept")] = Path("data/demo"),
) -> None:
    """Serve the example adapters and print curl lines to try them."""
    with one_line_errors():
        from server.cli.demo import announce_tries, demo_settings

        settings = demo_settings(model, host, port, data_dir)
        run_server(settings, lambda name, url: announce_tries(settings, name, url))


def run_server(settings: Settings, on_ready: Callable[[str, str], None] | None = None) -> None:
    """Load, listen, and stay until a signal ends it.

    ``on_ready`` is told the base model's name and the server's address.
    """
    from server.observability.logs import configure_logging

    is_json = settings.log_format == "json"
    configure_logging(settings.log_level, settings.log_format)
    app, base, names = load_app(settings)

    def announce(url: str) -> None:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
        lines = [
            f"[bold]{url}[/]  (API under /v1, reference under /docs)",
            f"model     {base}",
            f"adapters  {shown or 'none yet'}",
        ]
        if is_json:
            import structlog

            structlog.get_logger(__name__).info("listening", url=url, adapters=len(names))
        else:
            console.print(Panel("\n".join(lines), title="reft-serve is ready", expand=False))
        if on_ready is not None:
            on_ready(base, url)

    from server.http.run import DrainingServer

    DrainingServer(app, settings, announce).run()


def load_app(settings: Settings) -> tuple[FastAPI, str, list[str]]:
    """The application with its model loaded, the base model's name, and those of its adapters."""
    from server.keys.door import check_exposure
    from server.keys.store import open_store

    check_place(settings)
    with open_store(settings) as store:
        check_exposure(settings, store)
    is_json = settings.log_format == "json"  # then nothing but records is written
    with nullcontext() if is_json else console.status(f"Loading {settings.model} …"):
        from server.app import adapter_files, create_app, register_files
        from server.engines import build_engine, load_base_model
        from server.observability.logs import adopt_library_loggers, hide_progress_bars
        from server.registry import open_registry

        adopt_library_loggers()
        if is_json or not console.is_terminal:
            hide_progress_bars()
        files = adapter_files(settings.adapters, settings.max_adapter_bytes)
        loaded = load_base_model(settings)
        # Here and not at the application's start, so that a file for another model is one line, and
        # before the engine, whose processes may take a minute to begin.
        registry = open_registry(settings, loaded.description)
        try:
            register_files(registry, files)
            names = [version.name for version in registry.all_current()]
        finally:
            registry.close()
        engine = build_engine(settings, loaded)
    app = create_app(settings.model_copy(update={"adapters": ()}), engine, loaded)
    return app, loaded.description.name, names


def check_place(settings: Settings) -> None:
    """Refuse an address or a data folder that cannot be used, before a model is loaded for it.

    Raises :class:`InvalidRequest`.
    """
    check_address(settings.host, settings.port)
    folder = settings.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _bad_folder(folder, error.strerror or "it cannot be made") from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise _bad_folder(folder, "no permission to write there")


def check_address(host: str, port: int) -> None:
    """Raise :class:`InvalidRequest` unless a server could listen there now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise InvalidRequest.because("host", host, "an address of this machine") from None
    with socket.socket(family, kind, protocol) as probe:
        # As uvicorn does; else connections of a server that just ended would be in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            expected = "a port above 1023, or the right to use a lower one"
            raise InvalidRequest.because("port", port, expected) from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InvalidRequest.because("host", host, "an address of this machine") from None
            raise InvalidRequest.because(
                "port", port, f"a free one ({host}:{port} is in use; 0 takes any that is free)"
            ) from None


def _bad_folder(folder: Path, reason: str) -> InvalidRequest:
    return InvalidRequest.because(
        "data_dir", str(folder), f"a folder this user may write to ({reason}); set --data-dir"
    )

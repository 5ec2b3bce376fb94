"""The ``reft`` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel

from server.cli_adapters import adapters_app
from server.cli_errors import console, one_line_errors
from server.cli_methods import methods

if TYPE_CHECKING:
    from server.settings import Settings

app = typer.Typer(
    name="reft",
    help="Train and serve ReFT adapters over one frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(adapters_app, name="adapter")
app.command()(methods)


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, or 'demo'. Default: demo")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", "-a", help="Adapter file or folder to register; repeatable"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000; 0 takes a free one")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where adapters are kept")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: auto")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16. Default: auto")
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads of the model")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and answer, in tokens")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests decoded together")] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option(help="Time for open requests at the end")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json")] = None,
) -> None:
    """Serve a base model and its adapters over HTTP.

    Every setting can also come from a REFT_<NAME> variable; the keys REFT_API_KEY and
    REFT_ADMIN_KEY only from there, since a command line is visible to other users.
    """
    given: dict[str, Any] = {
        "model": model,
        "adapters": tuple(adapter) if adapter else None,
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "device": device,
        "dtype": dtype,
        "num_threads": num_threads,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "drain_timeout_s": drain_timeout_s,
        "log_level": log_level,
        "log_format": log_format,
    }
    with one_line_errors():
        from server.settings import Settings

        _serve(Settings(**{name: value for name, value in given.items() if value is not None}))


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Hub id, folder, or 'demo'")] = "demo",
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    data_dir: Annotated[Path, typer.Option(help="Where adapters are kept")] = Path("data/demo"),
) -> None:
    """Serve the example adapters and print curl lines to try them."""
    with one_line_errors():
        from server.demo import announce_tries, demo_settings

        settings = demo_settings(model, host, port, data_dir)
        _serve(settings, lambda name, url: announce_tries(settings, name, url))


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace the file's")
    ] = None,
) -> None:
    """Train an adapter."""
    with one_line_errors():
        from trainer.cli import train_command

        train_command(config, overrides or [])


@app.command()
def version() -> None:
    """Print the version."""
    from reft_core import __version__

    typer.echo(__version__)


def _serve(settings: Settings, on_ready: Callable[[str, str], None] | None = None) -> None:
    """Load, listen, and stay until a signal ends it.

    ``on_ready`` is told the base model's name and the server's address.
    """
    from server.logs import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    with console.status(f"Loading {settings.model} …"):
        from server.app import build_engine, create_app, load_base_model, register_files
        from server.registry import open_registry
        from server.run import DrainingServer

        loaded = load_base_model(settings)
        engine = build_engine(settings, loaded)
        # Here and not at the application's start, so that a bad file is one clear line.
        registry = open_registry(settings, loaded.description)
        try:
            register_files(registry, settings.adapters, settings.max_adapter_bytes)
            names = [version.name for version in registry.all_current()]
        finally:
            registry.close()

    def announce(url: str) -> None:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
        lines = [
            f"[bold]{url}[/]  (API under /v1, reference under /docs)",
            f"model     {loaded.description.name}",
            f"adapters  {shown or 'none yet'}",
        ]
        console.print(Panel("\n".join(lines), title="reft-serve is ready", expand=False))
        if on_ready is not None:
            on_ready(loaded.description.name, url)

    app = create_app(settings.model_copy(update={"adapters": ()}), engine, loaded)
    DrainingServer(app, settings, announce).run()

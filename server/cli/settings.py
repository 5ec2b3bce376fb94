"""Every setting as a flag: the options of commands that need settings, read off the class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_core.errors import InvalidRequest
from server.cli.errors import console
from server.settings.fields import Field, all_fields

if TYPE_CHECKING:
    from server.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="REFT_CONFIG", help="Settings file, YAML or TOML"),
]

_SHOWN_FIRST = frozenset(
    [
        "model",
        "engine",
        "adapters",
        "host",
        "port",
        "data_dir",
        "device",
        "dtype",
        "num_threads",
        "max_model_len",
        "max_num_seqs",
        "drain_timeout_s",
        "log_level",
        "log_format",
    ]
)


def with_settings(function: Callable[[Path | None, dict[str, Any]], None]) -> Callable[..., None]:
    """``function`` as a command with ``--config`` and a flag for every setting.

    It is called with the config file's path and the flags that were given, by setting.
    """

    return with_settings_and()(function)


def with_settings_and(
    **more: tuple[Any, Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As :func:`with_settings`, for a function with further options: their types and defaults."""

    def dress(function: Callable[..., None]) -> Callable[..., None]:
        def command(config: Path | None = None, **given: Any) -> None:
            own = {name: given.pop(name) for name in more}
            flags = {name: value for name, value in given.items() if value not in (None, [])}
            function(config, flags, **own)

        parameters = [_parameter(name, *about) for name, about in more.items()]
        return _dressed(command, function, parameters)

    return dress


def load_with_flags(config: Path | None, flags: dict[str, Any]) -> Settings:
    """The effective settings. Says on the terminal which variables look misspelt.

    Raises :class:`InvalidRequest`.
    """
    from server.settings.sources import load_settings

    sourced = load_settings(config, flags)
    for warning in sourced.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    return sourced.settings


def settings_of_data(
    config: Path | None, data_dir: Path | None, *, may_be_new: bool = False
) -> Settings:
    """The settings of the server whose database a command opens itself.

    Raises :class:`InvalidRequest`, also where there is no database yet, unless it ``may_be_new``:
    a mistyped folder would become an empty one.
    """
    settings = load_with_flags(config, {} if data_dir is None else {"data_dir": str(data_dir)})
    if not may_be_new and settings.database_url is None and not settings.catalog_file.exists():
        raise InvalidRequest.because(
            "data_dir",
            str(settings.data_dir),
            "the folder of a server that has run; set --data-dir",
        )
    return settings


def _dressed(
    command: Callable[..., None], function: Callable[..., None], more: list[inspect.Parameter]
) -> Callable[..., None]:
    """``command`` with the name and text of ``function``, and the options as its parameters."""
    options = [_option(field) for field in all_fields().values() if field.flag is not None]
    signature = inspect.Signature([*more, _parameter("config", Config, None), *options])
    command.__name__ = function.__name__
    command.__doc__ = _reflowed(function.__doc__ or "")
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def _reflowed(text: str) -> str:
    """``text`` with one line a paragraph, as help texts keep line ends."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _option(field: Field) -> inspect.Parameter:
    """A field's flag. It takes any text: what is allowed is decided in the settings alone."""
    assert field.flag is not None
    names = [field.flag, *(["-a"] if field.name == "adapters" else [])]
    if field.is_switch:
        names = [f"{field.flag}/--no-{field.flag.removeprefix('--').removeprefix('allow-')}"]
    option = typer.Option(
        *names,
        help=f"{_sentence(field)} Default: {field.shown(field.default)}",
        metavar=_metavar(field),
        show_default=False,
        rich_help_panel=_panel(field),
        autocompletion=(lambda: list(field.choices)) if field.choices else None,
    )
    kind: Any = list[str] if field.is_list else bool if field.is_switch else str
    return _parameter(field.name, Annotated[kind | None, option], None)


def _panel(field: Field) -> str | None:
    """The box of the help that has the flag. Switches' two names would cut the others short."""
    if field.name in _SHOWN_FIRST:
        return None
    return "Switches" if field.is_switch else "More settings"


def _sentence(field: Field) -> str:
    text = field.description.replace("[", "(").replace("]", ")")  # help texts are markup
    choices = f" ({', '.join(field.choices)})" if field.choices else ""
    repeatable = "; repeatable" if field.is_list else ""
    starts_with_value = text.partition(" ")[0].endswith(":")
    text = text if starts_with_value else f"{text[:1].upper()}{text[1:]}"
    return f"{text}{choices}{repeatable}."


def _metavar(field: Field) -> str:
    if field.is_switch:
        return " "  # the column of types is left to the names
    if field.is_path:
        return "PATH"
    return "NUMBER" if "number" in field.allowed else "TEXT"

"""How the command line reports a failure: one clear line, status 1, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from reft_core.errors import ReftError

console = Console(stderr=True)

_UsageError: Any = typer.BadParameter.__bases__[0]
"""What every mistake on a command line is; typer has no public name for it."""
USAGE_STATUS = 2


class OneLineGroup(TyperGroup):
    """The root of the commands: a mistake on the command line is one line too, and status 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line and exit."""
        extra["standalone_mode"] = False
        if not standalone_mode:
            return super().main(*args, **extra)
        try:
            status = super().main(*args, **extra)
        except _UsageError as error:
            context = error.ctx
            if type(error).__name__ != "NoArgsIsHelpError":  # which has printed the help
                path = "reft" if context is None else context.command_path
                _show(f"{error.format_message().rstrip('.')}; see '{path} --help'")
            sys.exit(USAGE_STATUS)
        except typer.Abort:
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that a user can do something about into one line and exit status 1."""
    try:
        yield
    except ReftError as error:
        _fail(str(error))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        _fail(f"{field}: {message}" if field else message)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(message: str) -> None:
    """Print ``message`` and end with status 1."""
    _show(message)
    raise typer.Exit(1)


def _show(message: str) -> None:
    console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)

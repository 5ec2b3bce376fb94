"""How the command line reports a failure: one clear line, status 1, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError
from rich.console import Console

from reft_core.errors import ReftError

console = Console(stderr=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that a user can do something about into one line and exit status 1."""
    try:
        yield
    except ReftError as error:
        _fail(error.message)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        _fail(f"{field}: {message}" if field else message)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(message: str) -> None:
    """Print ``message`` and end with status 1."""
    console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)

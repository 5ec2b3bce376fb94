"""``reft runs``: what ``reft train`` did here, a line a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from reft_core.errors import InvalidRequest
from server.cli.errors import console, one_line_errors
from server.cli.options import AsJson
from server.cli.text import print_json, print_table, ranges, safe

if TYPE_CHECKING:
    from trainer.runs import Run

runs_app = typer.Typer(help="List the trainings that were run here.")

_SORTS = ("newest", "value", "seconds", "parameters")
_STATES = ("finished", "failed", "interrupted")
File = Annotated[Path | None, typer.Option(help="The table; default: runs/runs.jsonl")]


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Only adapters whose name has this in it")] = "",
    data: Annotated[str, typer.Option(help="Only data whose path has this in it")] = "",
    base: Annotated[str, typer.Option(help="Only bases whose name has this in it")] = "",
    state: Annotated[str, typer.Option(help="Only finished, failed or interrupted ones")] = "",
    sort: Annotated[str, typer.Option(help="newest, value, seconds or parameters")] = "newest",
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """List the trainings that were run here."""
    if context.invoked_subcommand is not None:
        return
    with one_line_errors():
        if sort not in _SORTS:
            raise InvalidRequest.because("sort", sort, f"one of {', '.join(_SORTS)}")
        if state not in ("", *_STATES):
            raise InvalidRequest.because("state", state, f"one of {', '.join(_STATES)}")
        wanted = {"name": name, "data": data, "base": base, "state": state}
        found = [
            run
            for run in _read(file)
            if all(part in (getattr(run, field) or "") for field, part in wanted.items())
        ]
        found = _sorted(found, sort)
        if as_json:
            print_json([run.model_dump() for run in found])
        elif found:
            print_table(_table(found))
        else:
            console.print("no runs; `reft train DATA` makes one", markup=False)


@runs_app.command()
def show(
    run: Annotated[str, typer.Argument(help="Its id, or the name of its adapter: the newest")],
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of one run."""
    with one_line_errors():
        from trainer.runs import find_run

        found = find_run(_read(file), run)
        if as_json:
            print_json(found.model_dump())
            return
        table = Table.grid(padding=(0, 2))
        shown = found.model_dump(exclude_none=True, exclude={"layers", "metrics"})
        shown |= {f"layers of {name}": ranges(some) for name, some in (found.layers or {}).items()}
        shown |= {name: f"{value:.4f}" for name, value in found.metrics.items()}
        for field, value in shown.items():
            table.add_row(safe(field), safe(value))
        Console().print(table)


def _read(file: Path | None) -> list[Run]:
    from trainer.paths import RUNS_FILE
    from trainer.runs import read_runs

    found, num_bad = read_runs(file or RUNS_FILE)
    if num_bad:
        console.print(f"note: {num_bad} lines of {file or RUNS_FILE} are no runs", markup=False)
    return found


def _sorted(found: list[Run], by: str) -> list[Run]:
    """Newest or best first; shortest or smallest first."""
    found = found[::-1]
    if by == "value":
        return sorted(found, key=lambda run: (run.value is None, -(run.value or 0)))
    if by == "seconds":
        return sorted(found, key=lambda run: run.seconds)
    if by == "parameters":
        return sorted(found, key=lambda run: (run.num_parameters is None, run.num_parameters or 0))
    return found


def _table(found: list[Run]) -> Table:
    table = Table("run", "started", "", "name", "base", "data", "method", "positions")
    for column in ("rank", "parameters", "steps", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("metric")
    table.add_column("base's", justify="right")
    table.add_column("adapter's", justify="right")
    for run in found:
        table.add_row(
            safe(run.id),
            safe(run.started_at[:16].replace("T", " ")),
            "" if run.state == "finished" else run.state,
            safe(run.name),
            safe(run.base),
            safe(run.data or ""),
            safe(run.method),
            safe(run.positions or ""),
            _number(run.rank),
            _number(run.num_parameters),
            _number(run.steps),
            f"{run.seconds:.0f}",
            safe(run.metric or ""),
            "" if run.base_value is None else f"{run.base_value:.3f}",
            "" if run.value is None else f"{run.value:.3f}",
        )
    return table


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"

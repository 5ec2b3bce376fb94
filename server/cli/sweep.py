"""``reft sweep``: flags to :mod:`trainer.sweep.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.errors import one_line_errors
from server.cli.options import (
    Overrides,
    Steps,
    TrainConfigFile,
    TrainRows,
    ValidRows,
    command_line,
    given,
)


def sweep(
    config: TrainConfigFile,
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(help="of the whole study; absent: 30")] = None,
    timeout: Annotated[float | None, typer.Option(help="seconds; no trial begins later")] = None,
    workers: Annotated[int | None, typer.Option(help="processes, each with its own base")] = None,
    objective: Annotated[str | None, typer.Option(help="loss, or accuracy of labels")] = None,
    pruner: Annotated[str | None, typer.Option(help="median, hyperband or none")] = None,
    steps: Steps = None,
    train_rows: TrainRows = None,
    valid_rows: ValidRows = None,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="REFT_SWEEP_STORAGE", help="a database's URL; absent: a journal file in --out"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the study in its storage")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(help="name=values: rank=[1,4], learning_rate='{low: 0.001, high: 0.01}'"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder; absent: runs/sweep")] = None,
) -> None:
    """Search positions, layers, tying, rank and learning rate on the validation rows.

    Goes on from the study's trials, if it has any.
    """
    with one_line_errors():
        from trainer.sections import mapping_of
        from trainer.sweep.cli import sweep_command

        flags = given(
            trials=trials,
            timeout=timeout,
            workers=workers,
            objective=objective,
            pruner=pruner,
            steps=steps,
            train_rows=train_rows,
            valid_rows=valid_rows,
            storage=storage,
            name=name,
            space=mapping_of("space", space) if space else None,
            out=out,
        )
        sweep_command(config, overrides or [], flags, command_line())

"""``reft compare``: flags to :mod:`trainer.compare.cli`."""

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


def compare(
    config: TrainConfigFile,
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="such as zero_shot,peft_lora,loreft; absent: all usual ones")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="of the tested runs; absent: 0,1,2")] = None,
    steps: Steps = None,
    search: Annotated[
        int | None, typer.Option(help="settings tried for each method on the validation rows")
    ] = None,
    train_rows: TrainRows = None,
    valid_rows: ValidRows = None,
    test_rows: Annotated[int | None, typer.Option(help="drawn of the test file")] = None,
    reference: Annotated[
        str | None, typer.Option(help="method that the others' differences are from")
    ] = None,
    measure_serving: Annotated[
        int | None, typer.Option(help="requests to time with each adapter and without; absent: 0")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder; absent: runs/compare")] = None,
) -> None:
    """Train and test many methods under equal data, steps and search effort.

    Goes on from the results in the folder; several processes may share one.
    """
    with one_line_errors():
        from trainer.compare.cli import compare_command

        flags = given(
            methods=methods,
            seeds=seeds,
            steps=steps,
            search=search,
            train_rows=train_rows,
            valid_rows=valid_rows,
            test_rows=test_rows,
            reference=reference,
            measure_serving=measure_serving,
            out=out,
        )
        compare_command(config, overrides or [], flags, command_line())

"""``reft compare``: flags to :mod:`trainer.compare.cli`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from server.cli.errors import one_line_errors


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of a training")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace the file's")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="such as zero_shot,peft_lora,loreft; absent: all usual ones")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="of the tested runs; absent: 0,1,2")] = None,
    steps: Annotated[int | None, typer.Option(help="of every training")] = None,
    search: Annotated[
        int | None, typer.Option(help="settings tried for each method on the validation rows")
    ] = None,
    train_rows: Annotated[int | None, typer.Option(help="drawn of the training file")] = None,
    valid_rows: Annotated[int | None, typer.Option(help="drawn of the validation file")] = None,
    test_rows: Annotated[int | None, typer.Option(help="drawn of the test file")] = None,
    reference: Annotated[
        str | None, typer.Option(help="method that the others' differences are from")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder; absent: runs/compare")] = None,
) -> None:
    """Train and test many methods under equal data, steps and search effort.

    Goes on from the results in the folder; several processes may share one.
    """
    with one_line_errors():
        from trainer.compare.cli import compare_command

        flags = {
            "methods": methods,
            "seeds": seeds,
            "steps": steps,
            "search": search,
            "train_rows": train_rows,
            "valid_rows": valid_rows,
            "test_rows": test_rows,
            "reference": reference,
            "out": out,
        }
        given = {name: value for name, value in flags.items() if value is not None}
        compare_command(config, overrides or [], given, shlex.join(["reft", *sys.argv[1:]]))

"""``reft compare``: the terminal around :func:`trainer.compare.run.compare`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.cli import ending_told
from trainer.compare.config import CompareConfig
from trainer.compare.render import seconds, shown
from trainer.compare.report import write_report
from trainer.compare.run import Comparison, compare
from trainer.compare.table import Row, table_rows
from trainer.config.file import read_config
from trainer.progress import BarProgress
from trainer.sections import read_section


def compare_command(
    path: Path, overrides: Sequence[str], given: Mapping[str, Any], command: str
) -> None:
    """Run the comparison in the config file at ``path``, with the flags that are ``given``.

    Ends the process with 1 on an error in config or data, and with 130 on Ctrl-C; results that
    are done stay, and the same command goes on from them.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    console = Console(stderr=True)
    with ending_told(console, "the same command goes on from what is done"):
        config = read_config(str(path), overrides)
        comparison = read_section(path, "compare", CompareConfig, given)
        found = compare(config, comparison, command=command, progress=BarProgress(console))
        rows = table_rows(found)
        write_report(found, rows, command)
    print_table(found, rows, Console())


def print_table(comparison: Comparison, rows: Sequence[Row], console: Console) -> None:
    """The table for a terminal, and where the files are."""
    factor = 100 if comparison.metric.percent else 1
    numbers = (comparison.metric.name, f"{comparison.clock} s")
    table = Table("method", "setting", "parameters", *numbers, "serving")
    for row in rows:
        if row.quality is None:
            table.add_row(row.label)
            continue
        table.add_row(
            row.label,
            row.setting,
            f"{row.num_parameters:,}",
            shown(row.quality, factor),
            f"{seconds(comparison, row):.0f}",
            f"{row.serving_scope}, {row.serving_extra_percent:+.2g} %",
        )
    console.print(table)
    for row in rows:
        if row.error:
            line = f"failed: {row.label}: {row.error}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, reason in comparison.left_out.items():
        console.print(f"left out: {name}: {reason}", soft_wrap=True)
    console.print(f"report: {comparison.config.out / 'report.md'}", soft_wrap=True)

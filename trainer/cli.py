"""``reft train``: the terminal around :func:`trainer.train.train`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reft_core.errors import ReftError
from trainer.config_file import load_config
from trainer.progress import BarProgress
from trainer.report import metric_rows
from trainer.train import TrainResult, train

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def train_command(config: Path, overrides: list[str]) -> None:
    """Train the adapter that ``config`` describes and print where it is.

    Ends the process with 1 on an error in config, data or training, and with 130 on
    Ctrl-C; nothing has been written then.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    console = Console(stderr=True)
    command = shlex.join(["reft", "train", str(config), *overrides])
    try:
        result = train(
            load_config(config, overrides), command=command, progress=BarProgress(console)
        )
    except ReftError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise SystemExit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        raise SystemExit(EXIT_INTERRUPTED) from None
    print_summary(result, Console())


def print_summary(result: TrainResult, console: Console) -> None:
    """What a person wants to know of a finished run."""
    table = Table("metric", "base", "adapter", title=result.config.name, title_justify="left")
    for row in metric_rows(result.metrics):
        table.add_row(*row)
    console.print(table)
    share = 100 * result.num_trainable / result.num_base_parameters
    for name, value in (
        ("adapter", f"{result.config.output} ({result.adapter.num_bytes:,} bytes)"),
        ("digest", result.adapter.digest),
        ("report", str(result.config.report_dir / "report.md")),
        ("parameters", f"{result.num_trainable:,} ({share:.4f} % of the base)"),
        ("training", f"{result.fit.num_steps} steps in {result.fit.seconds:.0f} s"),
    ):
        console.print(f"{name:<10} {value}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """``python -m trainer CONFIG [KEY=VALUE …]``."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m trainer CONFIG.yaml [KEY=VALUE ...]")
    train_command(Path(sys.argv[1]), sys.argv[2:])

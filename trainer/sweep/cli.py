"""``reft sweep``: the terminal around :func:`trainer.sweep.run.sweep`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console

from trainer.cli import EXIT_ERROR, ending_told
from trainer.config.file import read_config
from trainer.sections import read_section
from trainer.sweep.config import SweepConfig
from trainer.sweep.report import best_trial, param_importances, shown, write_report
from trainer.sweep.run import sweep
from trainer.sweep.storage import without_password


def sweep_command(
    path: Path, overrides: Sequence[str], given: Mapping[str, Any], command: str
) -> None:
    """Run the sweep in the config file at ``path``, with the flags that are ``given``.

    Ends the process with 1 on an error in config or data, and with 130 on Ctrl-C; trials that
    are done stay, and the same command goes on from them.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    console = Console(stderr=True)

    def on_trial(trial: FrozenTrial) -> None:
        value = "" if trial.value is None else f"{trial.value:.4g}"
        error = trial.user_attrs.get("error", "")
        drawn = " ".join(f"{name}={shown(value)}" for name, value in trial.params.items())
        line = f"trial {trial.number}: {trial.state.name.lower()} {value} {drawn} {error}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with ending_told(console, "the same command goes on from the trials that are done"):
        config = read_config(str(path), overrides)
        settings = read_section(path, "sweep", SweepConfig, given)
        study = sweep(config, settings, on_trial=on_trial)
        command = without_password(command, settings.storage)
        found = write_report(study, config, settings, command)
    best = best_trial(study)
    if best is None:
        console.print("error: no trial was completed; see the report", style="red")
        raise SystemExit(EXIT_ERROR)
    out = Console()
    out.print(f"best: trial {best.number}, {settings.objective} {best.value:.4g}", highlight=False)
    for name, value in found.items():
        out.print(f"  {name}: {shown(value)}", markup=False, highlight=False, soft_wrap=True)
    for name, share in param_importances(study).items():
        out.print(f"  importance of {name}: {100 * share:.0f} %", highlight=False)
    out.print(f"config: {settings.out / 'best.yaml'}", soft_wrap=True, highlight=False)
    out.print(f"report: {settings.out / 'report.md'}", soft_wrap=True, highlight=False)

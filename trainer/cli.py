"""``reft train``: the terminal around :func:`trainer.train.train`."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reft_core.card import PAGE, metric_rows
from reft_core.errors import ReftError, TrainingError, explain
from trainer.checkpoints import last_checkpoint
from trainer.config import TrainConfig
from trainer.config.file import read_config
from trainer.presets import PRESETS
from trainer.processes import world
from trainer.progress import BarProgress, Progress, SilentProgress
from trainer.runs import Clock, Run, add_run, finished_run, unfinished_run
from trainer.train import TrainResult, train

logger = logging.getLogger(__name__)

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def train_command(
    target: Path | str,
    arguments: Sequence[str],
    check: Callable[[TrainConfig], None] = lambda config: None,
) -> TrainResult:
    """Train the adapter that the config ``target`` describes, or one on the data called so.

    ``arguments`` are settings, ``key=value`` or ``--key value``. ``check`` may refuse the config,
    by a :class:`ReftError`, before anything is done. Ends the process with 1 on an
    error in config, data or training, and with 130 on Ctrl-C; no adapter has been written then.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    console = Console(stderr=True)
    command = shlex.join(["reft", "train", str(target), *arguments])
    clock = Clock()
    with ending_told(console, "nothing was written"):
        config = read_config(str(target), settings_of(arguments))
        check(config)
    with ending_told(console, lambda: _kept(config)):
        try:
            result = train(config, command=command, progress=_progress(console))
        except ReftError as error:
            _record(config, unfinished_run(config, command, clock, "failed", error.message))
            raise
        except KeyboardInterrupt:
            _record(config, unfinished_run(config, command, clock, "interrupted"))
            raise
    print_summary(result, Console())
    if result.warning:
        console.print(f"warning: {result.warning}", style="red", markup=False, soft_wrap=True)
    _record(config, finished_run(result, clock))
    return result


def _kept(config: TrainConfig) -> str:
    """What an interrupted training leaves."""
    kept = last_checkpoint(config.checkpoint_dir)
    return f"add --resume to go on from {kept}" if kept else "nothing was written"


def _record(config: TrainConfig, run: Run) -> None:
    """Add the run to its table, in the first of several processes.

    A table that cannot be written is a warning: it must not hide how the run ended.
    """
    if config.runs_file is None or world()[0] != 0:
        return
    try:
        add_run(config.runs_file, run)
    except OSError as error:
        logger.warning("runs_file: the run is not in the table: %s", error)


@contextmanager
def ending_told(console: Console, kept: str | Callable[[], str]) -> Iterator[None]:
    """End the process with 1 and one message on an error of the user's, with 130 on Ctrl-C.

    ``kept`` says then what is left of the work.
    """
    try:
        yield
    except ReftError as error:
        console.print(
            f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise SystemExit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        left = kept if isinstance(kept, str) else kept()
        console.print(f"interrupted; {left}", markup=False, soft_wrap=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


def settings_of(arguments: Sequence[str]) -> list[str]:
    """Flags as ``key=value``: ``--key value``, ``--key=value``, and ``--key`` of a switch.

    Raises :class:`TrainingError` for a flag without a value, and for a value without a flag.
    """
    switches = {n for n, field in TrainConfig.model_fields.items() if field.annotation is bool}
    found = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_") if word.startswith("--") else name
        off = key.removeprefix("no_")
        if equals:
            found.append(f"{key}={value}")
        elif not word.startswith("--"):
            raise TrainingError(explain("argument", word, "key=value, or --key value"), field=word)
        elif off in switches and (key != off or not rest or rest[0] not in ("true", "false")):
            found.append(f"{off}={'true' if key == off else 'false'}")
        elif rest:
            found.append(f"{key}={rest.pop(0)}")
        else:
            raise TrainingError(explain(word, None, "a value behind it"), field=key)
    return found


def list_settings() -> None:
    """Print every setting, its default and what it means, and the presets."""
    console = Console()
    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for name, field in TrainConfig.model_fields.items():
        default = "" if field.default_factory or field.default is None else str(field.default)
        table.add_row(name, escape(default), escape(field.description or ""))
    console.print(table)
    presets = Table("preset", "meaning", box=None, pad_edge=False)
    for name, preset in PRESETS.items():
        presets.add_row(name, preset.about)
    console.print(presets)


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
        ("report", str(result.config.report_dir / PAGE)),
        ("parameters", f"{result.num_trainable:,} ({share:.4f} % of the base)"),
        ("training", f"{result.fit.num_steps} steps in {result.fit.seconds:.0f} s"),
    ):
        console.print(f"{name:<10} {value}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """``python -m trainer TARGET [SETTING …]``, also under ``accelerate launch``."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m trainer CONFIG.yaml|DATA [KEY=VALUE ...]")
    train_command(sys.argv[1], sys.argv[2:])


def _progress(console: Console) -> Progress:
    """A terminal's progress in the first of several processes, none in the others."""
    return BarProgress(console) if world()[0] == 0 else SilentProgress()

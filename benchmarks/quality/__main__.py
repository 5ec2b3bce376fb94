"""What training gives on real data: ``run`` does what is missing, ``report`` makes the page.

``run`` keeps one JSON a training in ``--out``; several processes may share it, and the same
command goes on from what is there. ``report`` sums finished parts up in
``benchmarks/results/train-*.json`` and writes ``docs/results.md`` from those files alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.provenance import save
from benchmarks.quality.domains import DOMAINS_TASKS, run_domains, summarise_domains
from benchmarks.quality.minute import NAME, measure_all
from benchmarks.quality.page import PAGE, read_documents, read_minute, render
from benchmarks.quality.run import base_model, run_part
from benchmarks.quality.summary import summarise
from benchmarks.quality.tasks import DTYPES, SEEDS, TASKS
from reft_core.loading import LoadedModel, load_any
from trainer.progress import BarProgress

ALL = [*TASKS, *DOMAINS_TASKS]


def main() -> None:
    """One of the two commands."""
    arguments = _arguments()
    {"run": _run, "report": _report, "minute": _minute}[arguments.command](arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, and keep what came of it")
    report = commands.add_parser("report", help="sum up what is done, and write the page")
    minute = commands.add_parser("minute", help="time one training of each labelling task")
    for command in (run, report, minute):
        command.add_argument("--data", type=Path, default=os.environ.get("REFT_DATA"))
        command.add_argument("--out", type=Path, default=Path("runs", "quality"))
        command.add_argument("--tasks", nargs="+", choices=ALL, default=ALL)
    run.add_argument("--parts", nargs="+", help="absent: all of each task")
    run.add_argument(
        "--seeds",
        type=int,
        choices=range(1, len(SEEDS) + 1),
        default=len(SEEDS),
        help="how many runs are tested; later ones go on from fewer",
    )
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    _check_data(arguments)
    progress = BarProgress(Console(stderr=True))
    command = shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]])
    bases: dict[str, LoadedModel] = {}
    for name in arguments.tasks:
        together = DOMAINS_TASKS.get(name)
        base = (together or TASKS[name]).base
        if base not in bases:
            bases[base] = load_any(base_model(base), dtype=DTYPES[base])
        if together is not None:
            run_domains(
                together, arguments.data, arguments.out, loaded=bases[base], progress=progress
            )
            continue
        task = TASKS[name]
        for part in task.parts:
            if arguments.parts is None or part in arguments.parts:
                run_part(
                    task,
                    part,
                    arguments.data,
                    arguments.out,
                    num_seeds=arguments.seeds,
                    loaded=bases[task.base],
                    command=command,
                    progress=progress,
                )


def _report(arguments: argparse.Namespace) -> None:
    """Tasks without a result yet are left as they were."""
    for name in arguments.tasks:
        if name in DOMAINS_TASKS:
            if document := summarise_domains(DOMAINS_TASKS[name], arguments.out):
                save(f"train-{name}", document)
        elif any((arguments.out / name).glob("*/results/final/*/*.json")):
            _check_data(arguments)
            save(f"train-{name}", summarise(TASKS[name], arguments.data, arguments.out))
    PAGE.write_text(render(read_documents(), read_minute()), encoding="utf-8")


def _minute(arguments: argparse.Namespace) -> None:
    """With nothing else running; then the report tells of it."""
    _check_data(arguments)
    save(NAME, measure_all(arguments.data, arguments.out, read_documents()))
    _report(argparse.Namespace(**{**vars(arguments), "tasks": []}))


def _check_data(arguments: argparse.Namespace) -> None:
    if arguments.data is None:
        raise SystemExit("--data: missing; name the folder of data sets, or set REFT_DATA")


if __name__ == "__main__":
    main()

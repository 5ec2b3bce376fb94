"""Thirty examples of each demo task, from `reft train` to a measured adapter: docs/tickets.md.

usage: python -m benchmarks.thirty
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.provenance import RESULTS, provenance, save

NUM_ROWS = 30
EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Task:
    """One of the examples, and how its answers are judged."""

    folder: str
    about: str
    measure: str
    metric: str
    settings: tuple[str, ...] = ()

    @property
    def base_metric(self) -> str:
        """The same of the base."""
        split, prefix, name = self.metric.rpartition("test_")
        return f"{split}{prefix}base_{name}"


TASKS = (
    Task(
        "emoji",
        "answers with emoji only",
        "emoji only",
        "test_emoji_only",
        ("metrics=[emoji_only]",),
    ),
    Task(
        "json_answer",
        "answers with one line of JSON",
        "valid JSON",
        "test_valid_json",
        ("metrics=[valid_json]",),
    ),
    Task("intent", "six labels of a shop's messages", "likeliest label right", "label_choice"),
    Task("sentiment", "positive or negative", "likeliest label right", "label_choice"),
)


@dataclass(frozen=True)
class Outcome:
    """What thirty rows gave."""

    folder: str
    test_rows: int
    base: float
    adapter: float
    seconds: float
    cpu_seconds: float
    """Of the whole command, all threads together."""


def run(task: Task, scratch: Path) -> Outcome:
    """Train on the first rows, in a process of its own as a user does."""
    data, test = scratch / f"{task.folder}.jsonl", EXAMPLES / task.folder / "test.jsonl"
    lines = (EXAMPLES / task.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    data.write_text("".join(f"{line}\n" for line in lines[:NUM_ROWS]), encoding="utf-8")
    folder = scratch / task.folder
    settings = [f"test={test}", f"report_dir={folder}", f"output={folder}/a.safetensors"]
    command = [sys.executable, "-m", "trainer", str(data), *settings, *task.settings]
    before, start = _cpu_seconds(), time.perf_counter()
    subprocess.run([*command, "runs_file=null"], check=True, cwd=scratch, stdout=subprocess.DEVNULL)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - before
    metrics = json.loads((folder / "report.json").read_text(encoding="utf-8"))["metrics"]
    return Outcome(
        task.folder,
        len(test.read_text(encoding="utf-8").splitlines()),
        round(metrics[task.base_metric], 4),
        round(metrics[task.metric], 4),
        round(seconds, 1),
        round(cpu_seconds, 1),
    )


def table(outcomes: list[Outcome]) -> str:
    """The table of the page."""
    lines = ["| task | figure on test rows | base | adapter | seconds | CPU s |"]
    lines.append("|---|---|---|---|---|---|")
    for task, found in zip(TASKS, outcomes, strict=True):
        lines.append(
            f"| {task.about} | {task.measure}, {found.test_rows} rows | {found.base:.2f} | "
            f"{found.adapter:.2f} | {found.seconds:.0f} | {found.cpu_seconds:.0f} |"
        )
    return "\n".join(lines)


def read_outcomes() -> list[Outcome]:
    """Those that are committed."""
    document = json.loads((RESULTS / "train-thirty.json").read_text(encoding="utf-8"))
    return [Outcome(**found) for found in document["results"]]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run all of them, save the result and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = [run(task, Path(scratch)) for task in TASKS]
    found = {"rows": NUM_ROWS, "results": list(map(asdict, outcomes)), "provenance": provenance()}
    save("train-thirty", found)
    print(table(outcomes))


if __name__ == "__main__":
    main()

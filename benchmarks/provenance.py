"""What a result needs beside its numbers: command, commit, hardware, versions."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from reft_core.environment import environment

RESULTS = Path(__file__).parent / "results"
_FACTS = ("cpu", "threads", "gpu", "python", "torch", "transformers")


def provenance() -> dict[str, str | int]:
    """Facts about this run."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "command": shlex.join(["python", "-m", *_module_and_arguments()]),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: fact for name, fact in environment().items() if name in _FACTS},
    }


def save(name: str, document: dict[str, object]) -> Path:
    """Write a result to ``results/{name}.json``, whole or not at all, and return where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(document, indent=1) + "\n")
    return scratch.replace(path)


def _module_and_arguments() -> list[str]:
    program = Path(sys.argv[0])
    name = program.parent.name if program.stem == "__main__" else program.stem
    return [f"benchmarks.{name}", *sys.argv[1:]]

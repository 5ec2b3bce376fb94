"""What a result needs beside its numbers: command, commit, hardware, versions."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, str | int]:
    """Facts about this run; ``threads`` is of torch here, and an engine may have its own."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "command": shlex.join(["python", "-m", *_module_and_arguments()]),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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


def _cpu_name() -> str:
    """The processor and the instruction sets that decide matrix-product speed."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    flags = set(facts.get("flags", "").split())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{facts.get('model name', 'unknown')} ({', '.join(wide)})"

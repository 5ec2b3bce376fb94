"""What a run's numbers depend on beside its settings: hardware and versions."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

import reft_core

_WIDE = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def environment() -> dict[str, str | int]:
    """Facts about this machine and process; nothing that names the machine or its user.

    ``threads`` is of torch here, and an engine may have its own.
    """
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "reft-serve": reft_core.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """The processor and the instruction sets that decide matrix-product speed."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    flags = set(facts.get("flags", "").split())
    wide = [flag for flag in _WIDE if flag in flags]
    name = facts.get("model name", platform.machine())
    return f"{name} ({', '.join(wide)})" if wide else name

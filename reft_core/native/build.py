"""Compiles the C++ beside it for this machine, by the system's compiler, once; and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from reft_core.loading import DEFAULT_CACHE

SOURCE = Path(__file__).with_name("kernels.cpp")
FUNCTION_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""The dtypes of hidden states that there are kernels for."""
COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order."""

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-march=native")
_FAST_SUMS = (
    # Sums may be taken in any order, which vector code needs. All of -ffast-math would do more:
    # assume that there is no NaN, and switch off denormal numbers for the whole process.
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-freciprocal-math",
    "-ffp-contract=fast",
)
_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, from the cache folder if they were compiled before.

    None, with a logged reason, where there is no compiler or it does not take the source.
    """
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        log.info("native kernels are not used: %s", output or error)
        return None


def typed(library: ctypes.CDLL, name: str, *arguments: Any, result: Any = None) -> Any:
    """A function of the library that knows its types."""
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, result
    return function


def _compiled(folder: Path = DEFAULT_CACHE / "native") -> Path:
    """The library's file, named after all that decides what is in it."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler found: tried {', '.join(COMPILERS)}")
    flags = [*_FLAGS, *_FAST_SUMS, *_openmp()]
    version = _run([compiler, "--version"])
    sources = (path.read_text() for path in sorted(SOURCE.parent.glob("*.[ch]pp")))
    facts = (*sources, compiler, version, *flags, _instruction_sets())
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
    target = folder / f"{name}.so"
    if not target.is_file():
        started = time.monotonic()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            _run([compiler, *flags, str(SOURCE), "-o", str(built)])
            os.replace(built, target)
        log.info("compiled native kernels in %.1f s", time.monotonic() - started)
    return target


def _openmp() -> tuple[str, ...]:
    """Apple's compiler has no OpenMP; there the loops run on one thread."""
    return () if sys.platform == "darwin" else ("-fopenmp",)


def _instruction_sets() -> str:
    """What ``-march=native`` stands for; a home folder may be shared between machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = ("model name", "flags", "Features")
    facts = {line.partition(":")[0].strip(): line for line in lines if line.startswith(names)}
    return "".join([platform.machine(), platform.processor(), *facts.values()])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.stdout

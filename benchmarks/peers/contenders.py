"""Who is compared, and the settings each may choose from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import LLAMACPP, VLLM, Environment, python_of
from benchmarks.peers.gguf_weights import demo_gguf
from benchmarks.peers.plugin import plugin_names
from benchmarks.peers.protocol import OWN_PYTHON, PeerMissing, Worker
from reft_core.loading import DEMO_MODEL

OURS = "reft"
STATIC = "transformers_static"
CONTINUOUS = "transformers_continuous"

_LOAD_S = 1800.0


@dataclass(frozen=True)
class Variant:
    """One way to load a peer. A peer's fastest variant on a workload is the one compared."""

    peer: str
    label: str
    module: str
    environment: Environment | None = None
    """None is the project's own."""
    load: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    """Settings of a run to choose from, by workload; () leaves a workload out. One that is not
    named is run with the worker's defaults."""
    plugins: Path | None = None
    """A folder that shows vLLM the project's plugin; see :mod:`plugin`. None: it loads none."""

    @property
    def name(self) -> str:
        """Of this variant among all."""
        return f"{self.peer}-{self.label}" if self.label else self.peer

    def options(self, workload: str) -> tuple[dict[str, Any], ...]:
        """The settings a run of this workload may have."""
        return self.runs.get(workload, ({},))


_PACKAGE = "benchmarks.peers"
_VLLM_MODULE = f"{_PACKAGE}.vllm_worker"
_FLASH = ({"flash": True}, {"flash": False})

VARIANTS = (
    Variant(OURS, "", f"{_PACKAGE}.reft_worker", runs={"c": ({"slots": 64},)}),
    Variant("vllm", "eager", _VLLM_MODULE, VLLM, {"eager": True}),
    Variant("vllm", "compiled", _VLLM_MODULE, VLLM, {"eager": False}),
    Variant(
        "llamacpp",
        "",
        f"{_PACKAGE}.llamacpp_worker",
        LLAMACPP,
        runs={
            "a": _FLASH,
            "b": _FLASH,
            "c": ({"wave": 64}, {"wave": 16}),
            "d": _FLASH,
        },
    ),
    Variant(
        STATIC,
        "",
        f"{_PACKAGE}.transformers_worker",
        runs={"c": ()},  # minutes of it, and b says as much
    ),
    Variant(
        CONTINUOUS,
        "",
        f"{_PACKAGE}.transformers_worker",
        load={"continuous": True},
        runs=dict.fromkeys("bcd", ()),
    ),
)


def start(variant: Variant, folder: Path, model: str, dtype: str, threads: int) -> Worker:
    """A worker that has been told to load its model; :func:`wait_loaded` waits until it has.

    ``folder`` holds the model's weights, ``model`` is the name they were asked for by. Raises
    :class:`PeerMissing` if the worker cannot be started.
    """
    python = python_of(variant.environment) if variant.environment else OWN_PYTHON
    weights = folder
    if variant.environment is LLAMACPP:
        if model != DEMO_MODEL:
            raise PeerMissing(f"needs a GGUF, which is made of the model {DEMO_MODEL!r} only")
        weights = demo_gguf(dtype)
    variables = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if variant.environment is not VLLM:
        variables["OMP_NUM_THREADS"] = str(threads)
    else:  # it binds its own threads; the variable would add to them
        variables["VLLM_PLUGINS"] = ",".join(plugin_names()) if variant.plugins else ""
        variables["PYTHONPATH"] = str(variant.plugins or "")
    worker = Worker(python, variant.module, f"{variant.name}-{dtype}", variables)
    cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else []
    try:
        worker.ask("pin", 60, cores=cores)
        worker.send("load", model=str(weights), dtype=dtype, threads=threads, settings=variant.load)
    except PeerMissing:
        worker.close()
        raise
    return worker


def wait_loaded(worker: Worker) -> dict[str, Any]:
    """What the worker said of itself when it had loaded: versions at least."""
    return worker.receive(_LOAD_S)

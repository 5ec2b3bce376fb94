"""Unfinished runs on disk: everything a step depends on, without pickle.

A checkpoint is a folder ``checkpoint-STEP`` with ``trainer_state.json``, which is the Trainer's,
and ``state.safetensors``, whose metadata hold the rest as JSON. It is written under another name
and renamed, so a folder of that name is whole whenever the process dies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reft_core.adapter import write_durably
from reft_core.errors import TrainingError

_STATE = "state.safetensors"
_PARTIAL = ".partial"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(folder: Path, step: int, trainer_state: str, state: dict[str, Any]) -> None:
    """Put a checkpoint into ``folder`` and remove the earlier ones.

    ``state`` is a tree of dicts, lists and tuples over tensors and what JSON knows.
    """
    tensors: dict[str, Tensor] = {}
    document = json.dumps(_pack(state, tensors))
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    write_durably(partial / "trainer_state.json", trainer_state.encode())
    write_durably(partial / _STATE, save(tensors, {"state": document}))
    finished = folder / f"checkpoint-{step}"
    shutil.rmtree(finished, ignore_errors=True)
    os.replace(partial, finished)
    for earlier in folder.glob("checkpoint-*"):
        if earlier != finished:
            shutil.rmtree(earlier, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in ``folder`` with the most steps."""
    found = {
        int(name[1]): path
        for path in folder.glob("checkpoint-*")
        if (name := _NAME.fullmatch(path.name))
    }
    return found[max(found)] if found else None


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The state that :func:`write_checkpoint` was given. Raises :class:`TrainingError`."""
    try:
        with safe_open(checkpoint / _STATE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            document = json.loads(file.metadata()["state"])
        state: dict[str, Any] = _unpack(document, tensors)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(f"{checkpoint}: no checkpoint ({error})") from error
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go to ``tensors``, each under a name."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(inner, tensors) for inner in value]}
    return {"value": value}


def _unpack(document: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = document.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(inner, tensors) for key, inner in value}
    if kind == "list":
        return [_unpack(inner, tensors) for inner in value]
    return value

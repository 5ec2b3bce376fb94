"""The worker's side of a training step: the same optimiser and the same clock for everyone.

Imports torch alone, as it runs in the environment of every peer.

Rows come as JSON: ``prompt`` and ``completion`` in token ids, and the ``positions`` of the prompt
that an adapter edits.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Row = dict[str, list[int]]

IGNORED = -100
RANK = 4
"""Of ReFT's edits, in every layer."""
LORA_RANK = 8
_LEARNING_RATE = 4e-3
_MAX_GRAD_NORM = 1.0
_MIB = 2**10
"""KiB, in which the kernel counts."""


class Learner(ABC):
    """Someone who trains; a worker's operations are its methods."""

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._optimiser: torch.optim.Optimizer | None = None
        self._trained: list[nn.Parameter] = []
        self._loaded_kib = 0

    @abstractmethod
    def read(self, model: str, dtype: str) -> dict[str, Any]:
        """Load the base from this folder; returns facts about the environment."""

    @abstractmethod
    def build(self, rule: str) -> Sequence[nn.Parameter]:
        """Put a fresh adapter on the base; returns what is trained."""

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> Any:
        """A batch of ``rows``, in order."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Mean loss over the completion tokens of a batch."""

    def load(
        self, model: str, dtype: str, threads: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Load the base. ``settings``: the position ``rule``, and ``batches`` of rows."""
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        about = self.read(model, dtype)
        self._loaded_kib = _status("VmRSS")
        _forget_peak()
        self._trained = list(self.build(settings["rule"]))
        self._batches = [self.collate(rows) for rows in settings["batches"]]
        self._optimiser = torch.optim.AdamW(self._trained, lr=_LEARNING_RATE, weight_decay=0.0)
        count = sum(parameter.numel() for parameter in self._trained)
        return {"versions": about, "num_trainable": count}

    def epoch(self) -> dict[str, Any]:
        """One pass over the batches: ``ms`` and ``losses`` of each step, and ``peak_mib``, the
        most memory the process had beyond what it had when the base was loaded."""
        assert self._optimiser is not None, "load comes first"
        ms, losses = [], []
        for batch in self._batches:
            started = time.perf_counter()
            self._optimiser.zero_grad()
            loss = self.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self._trained, _MAX_GRAD_NORM)
            self._optimiser.step()
            losses.append(loss.item())
            ms.append(1e3 * (time.perf_counter() - started))
        peak = (_status("VmHWM") - self._loaded_kib) / _MIB
        return {"ms": ms, "losses": losses, "peak_mib": peak}


def pad_right(rows: Sequence[Row]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` (B, T), as transformers' collators make
    them: padding on the right, no labels on prompts."""
    width = max(len(row["prompt"]) + len(row["completion"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.int64),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for at, row in enumerate(rows):
        start, end = len(row["prompt"]), len(row["prompt"]) + len(row["completion"])
        batch["input_ids"][at, :end] = torch.tensor(row["prompt"] + row["completion"])
        batch["attention_mask"][at, :end] = 1
        batch["labels"][at, start:end] = torch.tensor(row["completion"])
    return batch


def _status(name: str) -> int:
    """A size of this process in KiB, by its name in /proc; 0 where there is none."""
    return next((int(line.split()[1]) for line in _status_lines() if line.startswith(name)), 0)


def _status_lines() -> Iterator[str]:
    path = Path("/proc/self/status")
    yield from path.read_text().splitlines() if path.is_file() else ()


def _forget_peak() -> None:
    """Let the kernel count the most memory from here on."""
    path = Path("/proc/self/clear_refs")
    if path.is_file():
        path.write_text("5")

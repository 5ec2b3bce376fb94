"""Results on disk: one JSON file each, so that a comparison goes on where it ended.

Several processes may work on one folder. Each result has a lock, held while it is computed and
let go of by the system when its process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reft_core.adapter import write_durably
from reft_core.errors import TrainingError, explain
from trainer.compare.contenders import Setting

Phase = Literal["search", "final", "serving"]
Record = dict[str, Any]

_LONGEST_NAME = 150
"""Of a job, in characters; file systems take 255 bytes."""


@dataclass(frozen=True)
class Job:
    """One training or evaluation, and what names its result."""

    phase: Phase
    method: str
    setting: tuple[tuple[str, Any], ...]
    seed: int

    @classmethod
    def of(cls, phase: Phase, method: str, setting: Setting, seed: int) -> Job:
        """The job with a setting in order of its names."""
        return cls(phase, method, tuple(sorted(setting.items())), seed)

    @property
    def name(self) -> str:
        """``lr=0.001,rank=4,seed=0`` and the like, fit for a file name."""
        parts = [f"{key}={as_text(value)}" for key, value in (*self.setting, ("seed", self.seed))]
        name = ",".join(parts).replace("/", "_")
        if len(name) <= _LONGEST_NAME:
            return name
        return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def as_text(value: Any) -> str:
    """A setting's value for people and file names: a list as its parts."""
    return "+".join(map(as_text, value)) if isinstance(value, list | tuple) else str(value)


class Store:
    """The results in a folder."""

    def __init__(self, folder: Path, task: Mapping[str, Any]) -> None:
        """``task`` is what all results depend on, as JSON values.

        Raises :class:`TrainingError` naming what differs if the folder's results are of another.
        """
        self.folder = folder
        self.agree("task.json", task)

    def agree(self, name: str, facts: Mapping[str, Any]) -> None:
        """Keep ``facts`` under ``name``, or see that they are those that are kept.

        Raises :class:`TrainingError` naming what differs.
        """
        path = self.folder / name
        text = json.dumps(facts, indent=1, sort_keys=True)
        if not path.exists():
            write_durably(path, text.encode())
        known, asked = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        for key in sorted(known.keys() | asked.keys()):
            if known.get(key) != asked.get(key):
                allowed = (
                    f"{known.get(key)!r} as the results in {self.folder} have, or another folder"
                )
                raise TrainingError(explain(key, asked.get(key), allowed), field=key)

    def read(self, job: Job) -> Record | None:
        """The job's result, if it is there."""
        try:
            record: Record = json.loads(self._path(job).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record

    def write(self, job: Job, record: Mapping[str, Any]) -> None:
        """Keep the job's result, whole or not at all."""
        document = {
            "phase": job.phase,
            "method": job.method,
            "setting": dict(job.setting),
            "seed": job.seed,
            **record,
        }
        write_durably(self._path(job), json.dumps(document, indent=1, ensure_ascii=False).encode())

    def adapter_path(self, job: Job) -> Path:
        """Where the adapter file that a job trained is kept, if it is one."""
        return self._path(job).with_suffix(".safetensors")

    @contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """Whether the job is this process's to do; while it is, it is no other's."""
        path = self.folder / "locks" / f"{job.phase}-{job.method}-{job.name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                # Another may have done it between our look and the lock.
                yield self.read(job) is None
        finally:
            os.close(descriptor)

    def _path(self, job: Job) -> Path:
        return self.folder / "results" / job.phase / job.method / f"{job.name}.json"

"""The table of runs: a file to which every ``reft train`` adds a line, how it ended with it.

JSON lines, so that a program or a person can read it, and a line that a crash cut short loses that
line alone.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from reft_core.errors import InvalidRequest
from trainer.paths import shown_path, shown_source

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.train import TrainResult

State = Literal["finished", "failed", "interrupted"]


class Run(BaseModel):
    """One run. What is not known of it is None; of one that did not finish that is much."""

    id: str = Field(default_factory=lambda: secrets.token_hex(4))
    state: State
    started_at: str
    """UTC, ISO 8601."""
    seconds: float
    """From command to end."""
    command: str
    name: str
    base: str
    data: str | None = None
    data_sha256: str | None = None
    """Of the training rows."""
    method: str
    positions: str | None = None
    tied: bool | None = None
    layers: dict[str, list[int]] | None = None
    """Edited ones by site."""
    rank: int | None = None
    """The largest of any site."""
    num_parameters: int | None = None
    steps: int | None = None
    training_seconds: float | None = None
    training_cpu_seconds: float | None = None
    metric: str | None = None
    """The figure that counts, on the split that counts."""
    value: float | None = None
    base_value: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    path: str
    """Of the adapter file; of an unfinished run, where it would have been."""
    digest: str | None = None
    error: str | None = None


class Clock:
    """When a run began."""

    def __init__(self) -> None:
        self._started = datetime.now(UTC)

    def times(self) -> dict[str, Any]:
        """Beginning, and seconds since, as fields of a :class:`Run`."""
        seconds = (datetime.now(UTC) - self._started).total_seconds()
        started_at = self._started.isoformat(timespec="seconds")
        return {"started_at": started_at, "seconds": round(seconds, 1)}


def finished_run(result: TrainResult, clock: Clock) -> Run:
    """The line of a run that left an adapter."""
    config, spec = result.config, result.adapter.spec
    split, metric = result.last_split, result.sample_metric
    return Run(
        state="finished",
        **clock.times(),
        **_asked(config, result.command),
        base=spec.base.name,
        data_sha256=result.datasets["train"].sha256,
        positions=spec.positions.rule if spec.sites else None,
        tied=config.tied,
        layers={name: list(site.layers) for name, site in spec.sites.items()},
        rank=max((site.rank for site in spec.sites.values()), default=None),
        num_parameters=result.num_trainable,
        steps=result.fit.num_steps,
        training_seconds=round(result.fit.seconds, 1),
        training_cpu_seconds=round(result.fit.cpu_seconds, 1),
        metric=f"{split}_{metric}",
        value=result.metrics[f"{split}_{metric}"],
        base_value=result.metrics.get(f"{split}_base_{metric}"),
        metrics=result.metrics,
        digest=result.adapter.digest,
    )


def unfinished_run(
    config: TrainConfig, command: str, clock: Clock, state: State, error: str | None = None
) -> Run:
    """The line of a run that left none, with the settings that were given to it."""
    given = {
        name: str(getattr(config, name)) if name == "positions" else getattr(config, name)
        for name in ("positions", "tied", "rank", "steps")
        if name in config.model_fields_set
    }
    return Run(
        state=state,
        **clock.times(),
        **_asked(config, command),
        base=config.model,
        **given,
        error=error,
    )


def _asked(config: TrainConfig, command: str) -> dict[str, Any]:
    """What is known from the beginning."""
    data = config.data if config.train is None else str(config.train)
    return {
        "command": command,
        "name": config.name,
        "data": None if data is None else shown_source(data),
        "method": config.method,
        "path": shown_path(config.output),
    }


def add_run(file: Path, run: Run) -> None:
    """Add a line to the table, which other runs may be doing too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as table:
        fcntl.flock(table, fcntl.LOCK_EX)
        if table.seek(0, os.SEEK_END):
            table.seek(-1, os.SEEK_END)
            if table.read(1) != b"\n":  # a crash left half a line
                table.write(b"\n")
        table.write(run.model_dump_json(exclude_none=True).encode() + b"\n")
        table.flush()
        os.fsync(table.fileno())


def read_runs(file: Path) -> tuple[list[Run], int]:
    """The runs, oldest first, and the number of lines that are none."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    found, num_bad = [], 0
    for line in lines:
        try:
            found.append(Run.model_validate_json(line))
        except ValidationError:
            num_bad += bool(line.strip())
    return found, num_bad


def find_run(runs: Sequence[Run], wanted: str) -> Run:
    """The newest run with this id, the beginning of one, or this name.

    Raises :class:`InvalidRequest`.
    """
    for run in reversed(runs):
        if run.name == wanted or (len(wanted) >= 4 and run.id.startswith(wanted)):
            return run
    expected = "the id of a run, or its name; `reft runs` lists them"
    raise InvalidRequest.because("run", wanted, expected)

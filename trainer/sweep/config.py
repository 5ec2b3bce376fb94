"""What one sweep is told, besides the training config that all its trials share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.sweep.space import Space

Objective = Literal["loss", "accuracy"]


class SweepConfig(BaseModel):
    """The ``sweep`` section of a config file; command-line flags replace its values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Space = Space()
    trials: int = Field(
        default=30, ge=1, description="of the whole study: those it has already count"
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="seconds after which no trial begins"
    )
    workers: int = Field(default=1, ge=1, le=256, description="processes, each with its own base")
    objective: Objective = Field(
        default="loss",
        description="on the validation rows: the loss, or which label is the likeliest",
    )
    pruner: Literal["median", "hyperband", "none"] = "median"
    startup_trials: int = Field(
        default=5, ge=0, description="drawn at random before the sampler and the pruner learn"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the sampler")
    steps: int | None = Field(
        default=None, ge=1, description="of every training; absent: the config's epochs"
    )
    train_rows: int | None = Field(default=None, ge=1, description="drawn; absent: all")
    valid_rows: int | None = Field(default=None, ge=1)
    storage: str | None = Field(
        default=None, description="a database's URL; absent: a journal file in out"
    )
    name: str = Field(default="sweep", min_length=1, description="of the study in its storage")
    out: Path = Field(default=Path("runs", "sweep"), description="folder of study and report")

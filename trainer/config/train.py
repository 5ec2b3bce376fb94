"""All settings of a training run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from reft_core.spec import NAME_PATTERN, AdapterName
from trainer.config.data import DataSettings
from trainer.config.loop import LoopSettings
from trainer.config.method import MethodSettings
from trainer.data.sources import SUFFIXES
from trainer.nearest import nearest
from trainer.paths import RUNS_FILE
from trainer.presets import PRESETS, with_preset


def _own_name(values: dict[str, Any]) -> str:
    """The adapter's name, made of the data's where none is given."""
    source = Path(str(values.get("data") or values.get("train") or "adapter"))
    stem = source.stem if source.suffix in SUFFIXES else source.name
    if stem in ("train", "data") and source.is_absolute():
        stem = source.parent.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:96]
    return name if re.match(NAME_PATTERN, name) else "adapter"


class TrainConfig(LoopSettings, MethodSettings, DataSettings):
    """One training run. What is not given has a default, or is chosen from the data.

    ``model_fields_set`` tells which is which; see :mod:`trainer.defaults`.
    """

    preset: str | None = Field(default=None, description="settings of a paper's task")
    model: str = Field(default="demo", description="'demo', a hub id, or a folder")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the frozen base; edits are float32 always"
    )
    name: AdapterName = Field(default_factory=_own_name, description="absent: the data's")
    description: Annotated[str, StringConstraints(max_length=8192)] = ""
    licence: Annotated[str, StringConstraints(max_length=256)] = ""
    output: Path = Field(
        default_factory=lambda data: Path("runs", data["name"], f"{data['name']}.safetensors"),
        description="adapter file to write; absent: in runs/NAME, from where the command is given",
    )
    report_dir: Path = Field(
        default_factory=lambda data: data["output"].parent,
        description="absent: the folder of the adapter file",
    )
    runs_file: Path | None = Field(
        default=RUNS_FILE, description="table to which the run adds a line; null: to none"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_by_preset(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, dict) else values

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"no preset{nearest(value, PRESETS)}")
        return value

    def choosing(self, **settings: object) -> Self:
        """This config with ``settings`` as well, checked together with the given ones."""
        return type(self).model_validate(self.given() | settings)

    def given(self) -> dict[str, Any]:
        """The settings that are not left to defaults and choices, unvalidated again."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    @property
    def sized(self) -> bool:
        """Whether it is given how long to train."""
        return bool({"epochs", "steps"} & self.model_fields_set)

    @property
    def checkpoint_dir(self) -> Path:
        """Where an unfinished run can be resumed from."""
        return self.report_dir / "checkpoints"

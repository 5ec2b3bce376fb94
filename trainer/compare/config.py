"""What one comparison is told, besides the training config that all its methods share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from reft_core.errors import InvalidRequest
from trainer.compare.contenders import DEFAULT_METHODS, get_contenders
from trainer.nearest import nearest


def _split(value: object) -> object:
    """``a,b`` as a list; anything else unchanged."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


_Rows = Annotated[int, Field(ge=1)]


class CompareConfig(BaseModel):
    """The ``compare`` section of a config file; command-line flags replace its values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        default=DEFAULT_METHODS, min_length=1
    )
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(_split)] = (
        Field(default=(0, 1, 2), min_length=1, description="of the runs that are tested")
    )
    search: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="settings tried for each method on the validation split with the first "
        "seed; 1 takes each method's own default",
    )
    steps: int | None = Field(
        default=None, ge=1, description="of every training; absent: the config's epochs"
    )
    train_rows: _Rows | None = Field(
        default=None, description="rows drawn of the file; absent: all"
    )
    valid_rows: _Rows | None = None
    test_rows: _Rows | None = None
    settings: dict[str, dict[str, Any]] = Field(
        default={},
        description="training settings of single methods, such as "
        "{loreft: {positions: f1+l1}}; what is given here is not searched",
    )
    reference: str | None = Field(
        default=None, description="method that the others' differences are from; absent: none"
    )
    metric: Literal["loss", "perplexity"] | None = Field(
        default=None,
        description="of a causal model's free answers, in place of the config's first metric: how "
        "likely the references are; absent: that metric",
    )
    measure_serving: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="requests by which the time to the first token and the tokens a second of "
        "each adapter are measured beside the base's, on a causal model; 0: none",
    )
    out: Path = Field(default=Path("runs", "compare"), description="folder of results and report")

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            get_contenders(value)
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        return value

    @field_validator("reference")
    @classmethod
    def _compared(cls, value: str | None, info: ValidationInfo) -> str | None:
        methods = info.data.get("methods")  # absent: they are the mistake
        if value is not None and methods is not None and value not in methods:
            raise ValueError(f"one of the methods{nearest(value, methods)}")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each seed once")
        return value

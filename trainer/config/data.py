"""Settings of the data: where rows are, how they are read, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from reft_core.spec import TemplateSpec
from trainer.config.base import Fraction, Label, Settings
from trainer.data.columns import COLUMNS, ColumnNames
from trainer.data.rows import RowFormat
from trainer.data.templates import LABEL_TEMPLATE, label_lead
from trainer.evaluation.scoring import TEXT_METRICS
from trainer.nearest import nearest


class DataSettings(Settings):
    """The rows of a run, and how answers to them are judged."""

    data: str | None = Field(
        default=None,
        description="a file, a folder with train, valid and test files, or a data set's hub name "
        "('name' or 'name:config'); or give train instead",
    )
    train: Path | None = Field(default=None, description="file of training rows")
    valid: Path | None = Field(
        default=None,
        description="its loss chooses the parameters that are kept; absent: taken from training",
    )
    test: Path | None = None
    valid_share: Fraction = Field(
        default=0.1, gt=0, description="of training rows, where no validation rows are given"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="such as {text: sentence}: our name to the file's"
    )
    ignore_columns: Literal["all"] | tuple[str, ...] = Field(
        default=(), description="columns of the files to leave out; 'all' that mean nothing here"
    )
    leaks: Literal["refuse", "drop"] = Field(
        default="refuse", description="what to do with training rows that are evaluated too"
    )

    template: TemplateSpec | None = Field(
        default=None,
        description="absent: the base model's own chat template, or 'Text: …\\nLabel:' for labels",
    )
    input_template: str = Field(
        default="{instruction}\n\n{input}", description="of instruction rows that have an input"
    )
    system: str | None = Field(
        default=None, description="system message put before rows that have none"
    )
    labels: tuple[Label, ...] | None = Field(
        default=None,
        min_length=2,
        max_length=4096,
        description="a labeller's answers; rows must hold one of them, or its place among them",
    )
    max_length: int | None = Field(
        default=None, ge=2, description="most tokens of a row; absent: the base's context"
    )

    metrics: tuple[str, ...] = Field(default=("exact_match",), min_length=1)
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="in evaluation; absent: 8 more than the longest reference answer",
    )
    valid_rows: int | None = Field(
        default=None, ge=1, description="most validation rows measured while training"
    )
    eval_rows: int | None = Field(
        default=None, ge=1, description="most rows of a split that are answered in evaluation"
    )

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in TEXT_METRICS:
                raise ValueError(f"{name!r} is no metric{nearest(name, TEXT_METRICS)}")
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in COLUMNS:
                raise ValueError(f"{name!r} is no column of ours{nearest(name, COLUMNS)}")
        return value

    @field_validator("input_template")
    @classmethod
    def _takes_both(cls, value: str) -> str:
        if [value.count(name) for name in ("{instruction}", "{input}")] != [1, 1]:
            raise ValueError("must hold {instruction} and {input} exactly once")
        return value

    @field_validator("labels")
    @classmethod
    def _distinct_labels(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        stripped = [label.strip() for label in value or ()]
        if len(set(stripped)) != len(stripped) or "" in stripped:
            raise ValueError("labels must be distinct and not blank")
        return value

    @model_validator(mode="after")
    def _has_rows(self) -> Self:
        if self.data is None and self.train is None:
            raise ValueError(
                "no data: give data (a file, a folder or a hub name) or train (a file)"
            )
        if self.data is not None and self.train is not None:
            raise ValueError("data and train both name the training rows; give one of them")
        return self

    @property
    def row_format(self) -> RowFormat:
        """How to read the rows."""
        return RowFormat(
            ColumnNames(self.columns, self.ignore_columns),
            self.system,
            self.labels or (),
            self.input_template,
            label_lead(self.template or LABEL_TEMPLATE),
        )

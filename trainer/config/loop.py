"""Settings of the training loop."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, Positive, Settings

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]


class LoopSettings(Settings):
    """How long and how fast to train, what to keep, and whom to tell."""

    epochs: int = Field(default=6, ge=1, le=10_000)
    steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="of the optimiser, instead of epochs"
    )
    budget_seconds: Positive = Field(
        default=60, description="training aimed at when neither epochs nor steps are given"
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        le=65_536,
        description="rows of one step, in all processes and accumulated parts together",
    )
    accumulate: int = Field(
        default=1, ge=1, le=65_536, description="parts in which a step's rows are computed"
    )
    learning_rate: Positive = 4e-3
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_ratio: Fraction = 0.06
    weight_decay: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    max_grad_norm: Positive = 1.0
    autocast: bool = Field(
        default=False, description="run the frozen base's products in bfloat16; dtype stores it so"
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    prefix_cache_mb: int = Field(
        default=4096,
        ge=0,
        description="memory for what a frozen base computes once: keys and values of unedited "
        "prompt beginnings, states below the first edited layer, or what a head alone reads of an "
        "encoder",
    )

    eval_steps: int | None = Field(
        default=None, ge=1, description="steps between validations; absent: an epoch's"
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many validations that are no better"
    )
    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; absent: checkpoint_seconds"
    )
    checkpoint_seconds: Positive = 60
    resume: bool = Field(default=False, description="go on from the last checkpoint, if any")
    report_to: Tracker = Field(
        default="none", description="where curves go; tensorboard's to report_dir/tensorboard"
    )

    @model_validator(mode="after")
    def _parts_are_whole(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size, got {self.accumulate} and {self.batch_size}"
            )
        return self

"""The part of a training config that is about an encoder's head."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from reft_core.edits import Activation
from reft_core.spec import MAX_SIZE, HeadSpec, Pooling

HEAD_ONLY = "none"
"""The method that trains a head alone; the encoder stays as it is."""


class HeadConfig(BaseModel):
    """How an encoder's head is built and trained. Base models of other kinds have none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Pooling = Field(
        default="mean",
        description="'mean' of the tokens' states; the 'first' one's; or what the base's own "
        "'pooler' makes of the first",
    )
    hidden: int | None = Field(
        default=None, ge=1, le=MAX_SIZE, description="width of a dense layer; absent: none"
    )
    activation: Activation = Field(default="tanh", description="after the dense layer")
    learning_rate: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = Field(
        default=None, description="of the head; absent: as the interventions'"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the pooled state's numbers dropped in training"
    )

    @property
    def spec(self) -> HeadSpec:
        """The head as the adapter file states it."""
        activation = "identity" if self.hidden is None else self.activation
        return HeadSpec(pooling=self.pooling, hidden=self.hidden, activation=activation)

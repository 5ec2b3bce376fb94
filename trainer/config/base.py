"""What the groups of settings share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from reft_core.errors import InvalidRequest

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Label = Annotated[str, StringConstraints(max_length=256)]


class Settings(BaseModel):
    """A group of settings: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def changed(self, *names: str) -> list[str]:
        """Those settings that are not at their default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]


def as_value_error(check: Callable[[], object]) -> None:
    """Run ``check``; our own error becomes the ValueError that pydantic expects."""
    try:
        check()
    except InvalidRequest as error:
        raise ValueError(error.message) from None

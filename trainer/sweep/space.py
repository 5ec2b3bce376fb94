"""What a sweep searches: ranges and choices by setting, and how a draw becomes a training config.

Names are those of the training config, but for positions, which are searched as their two
numbers: ``first`` and ``last`` of ``f{first}+l{last}``. Layers may be told by part of the model,
since their numbers depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Protocol, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from reft_core.errors import TrainingError, explain
from reft_core.methods import METHODS
from reft_core.positions import PositionRule
from trainer.config.base import as_value_error

Scalar = bool | int | float | str
Value = Scalar | tuple[int, ...]

PARTS: Mapping[str, Callable[[int], range]] = {
    "upper_half": lambda n: range(n // 2, n),
    "lower_half": lambda n: range(n - n // 2),
    "middle": lambda n: range(n // 4, n - n // 4),
    "last": lambda n: range(n - 1, n),
}
"""Layers by the part of a model of n they are; besides ``all``, ``every:N`` and lists."""


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, both included; whole ones if both are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("low must be above 0 for a logarithmic range")
        return self


class Draws(Protocol):
    """An Optuna trial, as far as it is used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of a range."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number of a range."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of some choices."""


def _as_choices(value: object) -> object:
    """A single value as the only choice."""
    return [value] if isinstance(value, bool | int | float | str) else value


Options = Range | tuple[int | float, ...]


def _counts(least: int, options: Options) -> Options:
    """``options`` if they are whole numbers, one or more, none below ``least``."""
    numbers = _numbers(options)
    if not numbers or min(numbers) < least or not all(isinstance(n, int) for n in numbers):
        raise ValueError(f"one or more whole numbers of at least {least}")
    return options


def _rates(options: Options) -> Options:
    numbers = _numbers(options)
    if not numbers or min(numbers) <= 0:
        raise ValueError("one or more numbers above 0")
    return options


def _numbers(options: Options) -> tuple[int | float, ...]:
    """The choices, or both ends of a range."""
    return (options.low, options.high) if isinstance(options, Range) else options


_Choices = Annotated[Options, BeforeValidator(_as_choices)]
_PerSide = Annotated[_Choices, AfterValidator(partial(_counts, 0))]
_Ranks = Annotated[_Choices, AfterValidator(partial(_counts, 1))]
_Rates = Annotated[_Choices, AfterValidator(_rates)]


class Space(BaseModel):
    """The ``space`` of a sweep. What is a single value is set and not searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: _PerSide = (0, 1, 3)
    last: _PerSide = (1, 2, 4, 7)
    layers: Annotated[
        tuple[str | tuple[int, ...], ...], BeforeValidator(_as_choices), Field(min_length=1)
    ] = ("all", "every:2", "every:3", "upper_half")
    tied: Annotated[tuple[bool, ...], BeforeValidator(_as_choices), Field(min_length=1)] = (
        True,
        False,
    )
    rank: _Ranks = (1, 2, 4, 8)
    learning_rate: _Rates = Range(low=5e-4, high=1.2e-2, log=True)
    positions: Annotated[tuple[str, ...], BeforeValidator(_as_choices)] = Field(
        default=(), description="rules instead of first and last, such as prompt"
    )
    method: Annotated[tuple[str, ...], BeforeValidator(_as_choices)] = Field(
        default=(), description="absent: the config's"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for layers in self.layers:
            if isinstance(layers, str) and not _is_layers(layers):
                known = ", ".join(["all", "every:N", *PARTS])
                raise ValueError(explain("layers", layers, f"{known}, or a list of numbers"))
        for name in self.method:
            if name not in METHODS or METHODS[name].interchanges:
                known = ", ".join(n for n in METHODS if not METHODS[n].interchanges)
                raise ValueError(explain("method", name, f"some of {known}"))
        for rule in self.positions:
            as_value_error(partial(PositionRule.parse, rule))
        if not max(*_numbers(self.first), *_numbers(self.last)):
            raise ValueError("first and last are 0 in every choice: no position is edited")
        return self

    def draw(self, trial: Draws) -> dict[str, Value]:
        """One value for each name, from the trial; what has one choice is not asked for."""
        found: dict[str, Value] = {}
        for name in self._names:
            options = getattr(self, name)
            if isinstance(options, Range):
                found[name] = _from_range(trial, name, options)
            elif len(options) > 1:
                # Optuna stores choices that are plain values; lists of layers are not.
                texts = {_as_text(option): option for option in options}
                plain = all(isinstance(o, bool | int | float | str) for o in options)
                chosen = trial.suggest_categorical(name, list(options) if plain else list(texts))
                found[name] = chosen if plain else texts[chosen]
            elif options:
                found[name] = options[0]
        return found

    @property
    def _names(self) -> list[str]:
        """Those that a draw has; whole rules are instead of their two numbers."""
        instead = ("first", "last") if self.positions else ()
        return [name for name in type(self).model_fields if name not in instead]

    @property
    def searched(self) -> list[str]:
        """The names with more than one value."""
        return [
            name
            for name in self._names
            if isinstance(getattr(self, name), Range) or len(getattr(self, name)) > 1
        ]


def settings_of(drawn: Mapping[str, Value], num_layers: int) -> dict[str, Any]:
    """A draw as settings of a training config for a model of ``num_layers``.

    Raises :class:`TrainingError` for a draw that edits no position.
    """
    settings = dict(drawn)
    if "positions" not in settings:
        first, last = settings.pop("first"), settings.pop("last")
        sides = [f"f{first}"] * bool(first) + [f"l{last}"] * bool(last)
        if not sides:
            raise TrainingError(explain("first and last", 0, "one of them above 0"))
        settings["positions"] = "+".join(sides)
    if "+" not in str(settings["positions"]):
        settings["tied"] = True  # one side is one unit
    layers = settings["layers"]
    if isinstance(layers, str) and layers in PARTS:
        settings["layers"] = tuple(PARTS[layers](num_layers))
    return settings


def _is_layers(text: str) -> bool:
    return text in ("all", *PARTS) or re.fullmatch(r"every:[1-9]\d{0,3}", text) is not None


def _as_text(option: Value) -> str:
    return ",".join(map(str, option)) if isinstance(option, tuple) else str(option)


def _from_range(trial: Draws, name: str, options: Range) -> int | float:
    low, high = options.low, options.high
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=options.log)
    return trial.suggest_float(name, low, high, log=options.log)

"""What a source may not record, asked for by name and never guessed.

A missing option is an error that names it and what it may hold; one that contradicts the source
is an error too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import ValidationError

from reft_core.edits import ACTIVATION_NAMES, Activation
from reft_core.errors import InvalidRequest
from reft_core.methods.base import Phase
from reft_core.positions import Anchor, Cap, PositionRule
from reft_core.sites import ModelDescription
from reft_core.spec import PositionSpec, StorageDtype, TemplateSpec

BASE_TEMPLATE: Literal["base"] = "base"
"""The template option that means: the base model's own chat template."""


@dataclass(frozen=True)
class ConvertOptions:
    """What a source may not record. ``None`` means not given; a converter asks if it must.

    An option that the source does record may be left out, or must agree with it.
    """

    base: ModelDescription
    """The base model; ``base_from_folder`` makes one without loading weights."""
    name: str | None = None
    """The adapter's name; some sources bring one."""
    positions: str | None = None
    """The position rule, such as ``f7+l7`` (:mod:`reft_core.positions`)."""
    tied: bool | None = None
    anchor: Anchor | None = None
    cap: Cap | None = None
    method: str | None = None
    activation: Activation | None = None
    layers: tuple[int, ...] | None = None
    """Where to put a source that is one edit for any layer."""
    phase: Phase | None = None
    """Whether generated tokens are edited too, where a source leaves the choice."""
    template: TemplateSpec | Literal["base"] | None = None
    """How the prompt was written, or :data:`BASE_TEMPLATE`."""
    labels: tuple[str, ...] | None = None
    """What a classification head's outputs stand for, in order."""
    subspaces: Mapping[str, tuple[int, ...]] | None = None
    """Names for groups of a low-rank edit's ranks, which a request may then weigh."""
    strength: float = 1.0
    dtype: StorageDtype = "float32"
    """What the tensors are stored in."""
    description: str = ""
    licence: str = ""

    def required(self, option: str, allowed: str, why: str) -> Any:
        """The option's value. Raises :class:`InvalidRequest` if it was not given."""
        value = getattr(self, option)
        if value is None:
            raise InvalidRequest.because(option, value, f"{allowed}; {why}")
        return value

    def agreeing(self, option: str, recorded: object, source: str) -> None:
        """Refuse an option that contradicts what ``source`` records."""
        value = getattr(self, option)
        if value is not None and value != recorded:
            raise InvalidRequest.because(option, value, f"{recorded!r}, as recorded in {source}")

    def not_used(self, options: Iterable[str], why: str) -> None:
        """Refuse options that mean nothing for this source."""
        for option in options:
            if getattr(self, option) is not None:
                raise InvalidRequest.because(option, getattr(self, option), f"nothing; {why}")


OPTION_NAMES = tuple(option.name for option in fields(ConvertOptions))
"""Every option, for a command line to offer."""


def ask_activation(options: ConvertOptions, source: str) -> Activation:
    """The activation option, which ``source`` does not record."""
    value = options.required(
        "activation",
        "one of " + ", ".join(ACTIVATION_NAMES),
        f"{source} does not record it (its default is identity)",
    )
    if value not in ACTIVATION_NAMES:
        raise InvalidRequest.because("activation", value, "one of " + ", ".join(ACTIVATION_NAMES))
    activation: Activation = value
    return activation


def ask_positions(options: ConvertOptions, num_units: int, source: str) -> PositionSpec:
    """The position rule with its conventions, none of which ``source`` records.

    The number of parameter sets a site decides whether a two-sided rule is tied; the option
    may confirm it.
    """
    rule = options.required(
        "positions",
        "'fN', 'lN', 'fN+lM', 'prompt' or a list such as '0,3,-1'",
        f"{source} does not record which tokens it edits",
    )
    anchor = options.required(
        "anchor",
        "'prompt_end' (suffix positions count from the last prompt token) or 'before_last' "
        "(from the one before, as pyreft's Reft*Dataset classes do)",
        f"{source} does not record it",
    )
    cap = options.required(
        "cap",
        "'half' (each side takes at most half of a short prompt, as pyreft's "
        "get_intervention_locations does) or 'shared' (one side alone may take all of it)",
        f"{source} does not record it",
    )
    tied = num_units == 1
    spec = position_spec(rule, tied=tied, anchor=anchor, cap=cap)
    needed = spec.to_rule().num_units
    if needed != num_units:
        raise InvalidRequest.because(
            "positions", rule, f"a two-sided rule such as 'f2+l2': {source} has {num_units} units"
        )
    if options.tied is not None and options.tied != tied:
        held = "one unit" if tied else f"{num_units} units"
        raise InvalidRequest.because(
            "tied", options.tied, f"{tied}: {source} has {held} for each layer"
        )
    return spec


def position_spec(rule: str, *, tied: bool, anchor: Anchor, cap: Cap) -> PositionSpec:
    """The position part of a spec. Raises :class:`InvalidRequest` for a bad rule."""
    PositionRule.parse(rule)
    try:
        return PositionSpec(rule=rule, tied=tied, anchor=anchor, cap=cap)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0])
        raise InvalidRequest.because(option, first.get("input"), first["msg"]) from None


def whole_prompt(options: ConvertOptions, method: str, source: str) -> PositionSpec:
    """Positions of a method that reads the whole prompt, once the options agree with it."""
    recorded = {
        "method": method,
        "positions": "prompt",
        "tied": True,
        "anchor": "prompt_end",
        "cap": "shared",
    }
    for option, value in recorded.items():
        options.agreeing(option, value, f"{source} reads the whole prompt")
    return position_spec("prompt", tied=True, anchor="prompt_end", cap="shared")


def ask_template(options: ConvertOptions, source: str) -> TemplateSpec | None:
    """The template option, which ``source`` does not record; None is the base model's own."""
    value = options.required(
        "template",
        f"a prompt template, or {BASE_TEMPLATE!r} for the base model's own chat template",
        f"{source} does not record how its prompts were written",
    )
    if value == BASE_TEMPLATE:
        return None
    if not isinstance(value, TemplateSpec):
        raise InvalidRequest.because("template", value, f"a TemplateSpec or {BASE_TEMPLATE!r}")
    return value


def ask_name(options: ConvertOptions, source: str) -> str:
    """The name option, for sources that have no name of their own."""
    name: str = options.required(
        "name", "letters, digits, '.', '_' and '-'", f"{source} has no name"
    )
    return name

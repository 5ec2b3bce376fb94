"""What can be compared: each method with the settings that its search tries.

A search of n trials takes the first n of a fixed sequence, so that a longer one goes on where a
shorter one ended, every method gets the same number, and any process can name the trials without
asking another. Learning rates follow an additive recurrence on the logarithm (Kronecker's
sequence with the golden ratio), which covers an interval evenly at every length and begins in
its middle; sizes, and what else is listed, take turns.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, product
from typing import Any, Literal

from reft_core.errors import InvalidRequest
from reft_core.loading import ModelKind
from reft_core.methods import METHODS
from reft_core.methods.virtual import VIRTUAL_METHODS
from trainer.nearest import nearest

Kind = Literal["prompting", "head", "registry", "peft", "full"]
Setting = dict[str, Any]
"""Values by the name of the setting, as JSON has them: ``learning_rate``, ``rank``, ``shots``,
``head.pooling``. A part of a group of settings has the group's name and a dot before its own."""

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Contender:
    """One method of a comparison."""

    name: str
    kind: Kind
    label: str
    """For tables and plots."""
    learning_rates: tuple[float, float] | None = None
    """Lowest and highest of the search; None where nothing is trained."""
    size: str | None = None
    """The setting besides the learning rate that is searched."""
    sizes: tuple[int, ...] = ()
    every_token: bool = False
    """Whether it is meant for every token of the prompt, whatever positions the config has."""

    def settings(
        self,
        count: int,
        choices: Mapping[str, Sequence[Any]] | None = None,
        settled: Collection[str] = (),
    ) -> list[Setting]:
        """The first ``count`` settings of its search; fewer where there are no more to try.

        ``choices`` are tried besides its own sizes or instead of what is its own; what is
        ``settled`` is not tried.
        """
        options: dict[str, Sequence[Any]] = {}
        if self.size is not None and self.size not in settled:
            options[self.size] = self.sizes
        options |= choices or {}
        searched = self.learning_rates if "learning_rate" not in {*options, *settled} else None
        found: list[Setting] = []
        for index, setting in enumerate(islice(cycle(_in_turn(options)), count)):
            if searched is not None:
                setting = {"learning_rate": _spread(*searched, index)} | setting
            if setting not in found:
                found.append(setting)
        return found

    def on(self, kind: ModelKind) -> Contender:
        """Itself, with the ranks that its method takes on a base of this kind."""
        if kind == "encoder" and self.sizes == _RANKS:
            return replace(self, sizes=_ENCODER_RANKS)
        return self

    @property
    def trains(self) -> bool:
        """Whether it has parameters."""
        return self.learning_rates is not None


def _in_turn(options: Mapping[str, Sequence[Any]]) -> Iterator[Setting]:
    """Every combination once, those first in which each value of each list has had its turn."""
    if not options:
        yield {}
        return
    longest, *others = sorted(options, key=lambda name: -len(options[name]))
    for shifts in product(*(range(len(options[name])) for name in others)):
        for index, value in enumerate(options[longest]):
            turns = zip(others, shifts, strict=True)
            yield {longest: value} | {
                name: options[name][(index + shift) % len(options[name])] for name, shift in turns
            }


def _spread(low: float, high: float, index: int) -> float:
    """Point ``index`` of the sequence between two learning rates, to two digits."""
    place = (0.5 + index * _GOLDEN) % 1
    return float(f"{low * (high / low) ** place:.2g}")


_REFT_RATES = (1e-3, 1e-2)
_ADAPTER_RATES = (3e-4, 1e-2)
_RANKS = (4, 1, 8)
_ENCODER_RANKS = (16, 8, 4)
"""More, since a head reads all tokens; see :mod:`trainer.classify.defaults`."""
_WIDTHS = (8, 4, 16)
_LENGTHS = (16, 8, 32)

_LABELS = {
    "loreft": "LoReFT",
    "direft": "DiReFT",
    "direft_orthonormal": "DiReFT, orthonormal",
    "noreft": "NoReFT",
    "consreft": "ConsReFT",
    "lobireft": "LobiReFT",
    "red": "RED",
    "steering": "steering vector",
    "series_adapter": "series adapter",
    "parallel_adapter": "parallel adapter",
    "scaled_parallel_adapter": "scaled parallel adapter",
    "multi_head_parallel_adapter": "multi-head parallel adapter",
    "lora": "LoRA (ours)",
    "bitfit": "BitFit",
    "prefix_tuning": "prefix tuning (ours)",
    "prompt_tuning": "prompt tuning (ours)",
    "mam": "MAM adapter",
}


def _of_registry(name: str) -> Contender:
    """A method of our registry, with what its kind usually takes."""
    label = _LABELS.get(name, name)
    if name in VIRTUAL_METHODS:
        rates = (3e-3, 3e-1) if VIRTUAL_METHODS[name].kind == "embedding" else (1e-3, 3e-2)
        return Contender(name, "registry", label, rates, "prefix_length", _LENGTHS, name == "mam")
    method = METHODS[name]
    every_token = method.phase == "all" or name == "red"
    if not method.has_rank:
        return Contender(name, "registry", label, (5e-4, 2e-2), every_token=every_token)
    if method.phase == "all":
        return Contender(name, "registry", label, _ADAPTER_RATES, "rank", _WIDTHS, every_token)
    return Contender(name, "registry", label, _REFT_RATES, "rank", _RANKS)


_OTHERS = (
    Contender("zero_shot", "prompting", "zero-shot"),
    Contender("few_shot", "prompting", "few-shot", None, "shots", (8, 4, 16, 12, 6, 24, 2, 20)),
    Contender("head_only", "head", "head only", (1e-3, 1e-1)),
    Contender("peft_lora", "peft", "LoRA (PEFT)", _ADAPTER_RATES, "rank", _WIDTHS),
    Contender(
        "peft_prefix_tuning",
        "peft",
        "prefix tuning (PEFT)",
        (1e-3, 1e-1),
        "prefix_length",
        _LENGTHS,
    ),
    Contender(
        "peft_prompt_tuning",
        "peft",
        "prompt tuning (PEFT)",
        (3e-3, 3e-1),
        "prefix_length",
        _LENGTHS,
    ),
    Contender("full_finetuning", "full", "full fine-tuning", (5e-6, 5e-4)),
)

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        *_OTHERS,
        # Interchange interventions take another prompt, which rows do not bring.
        *map(_of_registry, [name for name in METHODS if not METHODS[name].interchanges]),
        *map(_of_registry, VIRTUAL_METHODS),
    )
}
"""By name. A bare name of the registry is our own implementation; ``peft_`` is PEFT's."""

DEFAULT_METHODS = (
    "zero_shot",
    "few_shot",
    "head_only",
    "peft_prompt_tuning",
    "peft_prefix_tuning",
    "peft_lora",
    "series_adapter",
    "parallel_adapter",
    "scaled_parallel_adapter",
    "red",
    "direft",
    "loreft",
    "full_finetuning",
)


def get_contenders(names: Iterable[str]) -> list[Contender]:
    """The methods called ``names``, in that order.

    Raises :class:`InvalidRequest` for an unknown name, with the nearest known one, and for a
    name that is given twice.
    """
    found: list[Contender] = []
    for name in names:
        if name not in CONTENDERS:
            raise InvalidRequest(
                f"methods: no method {name!r}{nearest(name, CONTENDERS)}", field="methods"
            )
        if CONTENDERS[name] in found:
            raise InvalidRequest.because("methods", name, "each method once")
        found.append(CONTENDERS[name])
    return found

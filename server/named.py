"""Adapters as a request names them, and what the names mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from reft_core.engine.interface import AdapterChoice
from reft_core.errors import InvalidRequest
from reft_core.templates import encode_text
from server.registry import Registry, Version


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as a request names it, with its options; see :class:`AdapterChoice`."""

    model: str
    strength: float | None = None
    subspaces: Mapping[str, float] = field(default_factory=dict)
    source: str | Sequence[int] | None = None


@dataclass(frozen=True)
class Resolved:
    """The adapters of one request, as the registry and the engine know them, in order."""

    versions: tuple[Version, ...]
    choices: tuple[AdapterChoice, ...]
    leads: bool
    """Whether the request's ``model`` names the first of them, and not the base model."""


def resolve(
    named: Sequence[NamedAdapter], registry: Registry, tokenizer: PreTrainedTokenizerBase
) -> Resolved:
    """What ``model`` means, perhaps the base model, and the adapters stacked on it.

    Blocks on the catalog. The base model has no options and cannot be stacked on something;
    raises :class:`InvalidRequest` then, and :class:`AdapterNotFound`.
    """
    versions: list[Version] = []
    choices: list[AdapterChoice] = []
    for place, each in enumerate(named):
        version = registry.resolve(each.model)
        if version is None:
            _check_base(each, place)
            continue
        versions.append(version)
        source = each.source or ()
        tokens = encode_text(tokenizer, source) if isinstance(source, str) else source
        choices.append(AdapterChoice(version.digest, each.strength, each.subspaces, tuple(tokens)))
    return Resolved(tuple(versions), tuple(choices), leads=len(versions) == len(named))


def _check_base(named: NamedAdapter, place: int) -> None:
    """Refuse the base model where it can mean nothing."""
    if place > 0:
        raise InvalidRequest.because("reft.stack", named.model, "names of adapters")
    for option in ("strength", "subspaces", "source"):
        if (value := getattr(named, option)) not in (None, {}):
            raise InvalidRequest.because(
                f"reft.{option}", value, "nothing, since the base model has no edits"
            )

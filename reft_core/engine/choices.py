"""From what a request says about an adapter to how it is used, every option checked."""

from __future__ import annotations

from collections.abc import Mapping

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse
from reft_core.engine.interface import AdapterChoice
from reft_core.errors import InvalidRequest

MAX_STRENGTH = 100.0
"""Largest magnitude by which a request may multiply an adapter's edits."""


def loaded_adapter(adapters: Mapping[str, Adapter], digest: str) -> Adapter:
    """The adapter of this digest. Raises :class:`InvalidRequest` if it is not loaded."""
    adapter = adapters.get(digest)
    if adapter is None:
        raise InvalidRequest.because("adapter", digest, "a loaded digest")
    return adapter


def as_use(choice: AdapterChoice, adapters: Mapping[str, Adapter]) -> AdapterUse:
    """The use that ``choice`` asks for of one of the loaded ``adapters``, by digest.

    Raises :class:`InvalidRequest` naming the option and its range.
    """
    adapter = loaded_adapter(adapters, choice.digest)
    strength = adapter.spec.strength if choice.strength is None else choice.strength
    if not abs(strength) <= MAX_STRENGTH:
        raise InvalidRequest.because(
            "strength", strength, f"a number from -{MAX_STRENGTH} to {MAX_STRENGTH}"
        )
    if adapter.num_virtual_tokens and strength not in (0, 1):
        raise InvalidRequest.because(
            "strength", strength, f"0 or 1, since {adapter.spec.name!r} brings trained tokens"
        )
    known = adapter.spec.subspaces or {}
    for name, factor in choice.subspaces.items():
        if name not in known:
            named = f"one of {', '.join(known)}, those" if known else "nothing, as there are none"
            allowed = f"{named} of {adapter.spec.name!r}"
            raise InvalidRequest.because("subspaces", name, allowed)
        if not abs(factor) <= MAX_STRENGTH:
            raise InvalidRequest.because(
                f"subspaces.{name}", factor, f"from -{MAX_STRENGTH} to {MAX_STRENGTH}"
            )
    subspaces = tuple(sorted(choice.subspaces.items()))
    return AdapterUse(adapter, strength, subspaces, choice.source)

"""From what a request says about an adapter to how it is used, every option checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from reft_core.adapter import Adapter
from reft_core.batch import AdapterUse, PromptEdits
from reft_core.engine.admission import check_length
from reft_core.engine.interface import AdapterChoice, Request
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


def resolve_edits(
    request: Request, adapters: Mapping[str, Adapter], max_model_len: int
) -> PromptEdits | None:
    """The request's adapters, resolved against its prompt; None where only the base acts.

    At strength 0 an adapter is left out with all that it is made of, virtual tokens too.
    """
    uses = [as_use(choice, adapters) for choice in request.adapters]
    for use in uses:
        if use.source:
            _check_source(use, len(request.prompt), max_model_len)
    uses = [use for use in uses if use.strength != 0]
    with_prefix = [u.adapter.spec.name for u in uses if u.adapter.num_virtual_tokens]
    if len(with_prefix) > 1:
        raise InvalidRequest.because("adapters", with_prefix, "at most one with a prefix")
    if not uses:
        return None
    reads: Literal["last", "all"] = "last" if request.params.prompt_logprobs is None else "all"
    return PromptEdits(tuple(uses), len(request.prompt), reads)


def _check_source(use: AdapterUse, prompt_len: int, max_model_len: int) -> None:
    """Refuse a source prompt that nothing takes, or whose positions do not pair up."""
    spec, length = use.adapter.spec, len(use.source)
    if not use.interchanges:
        raise InvalidRequest.because(
            "source", f"{length} tokens", f"none, since {spec.name!r} interchanges nothing"
        )
    check_length("source", length, max_model_len)
    in_source, in_prompt = (
        [len(unit) for unit in use.adapter.rule.resolve(n)] for n in (length, prompt_len)
    )
    if in_source != in_prompt:
        raise InvalidRequest.because(
            "source",
            f"{length} tokens",
            f"a prompt in which {spec.positions.rule} draws as many positions as in the "
            f"request's own: {in_prompt} a unit, not {in_source}",
        )

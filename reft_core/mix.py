"""Pre-mixing: one adapter file that does what a stack of several would.

A stack applies its adapters in order, each with its strength, so at a site that two of them
edit, the second reads what the first wrote. Where that composition is itself a canonical edit
it is computed here exactly, once, instead of in every request:

- edits of the site's output with the identity activation are affine maps, which compose:
  ranks add up, and gains multiply;
- edits of the site's input do not read each other, so they add up, also with a non-linear
  activation if it is the same one;
- an edit alone at its place takes its strength into ``up``, ``shift`` and ``gain``.

Anything else is refused, never approximated: such adapters can still be stacked per request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from reft_core.adapter import Adapter, EditKey, encode_adapter
from reft_core.compose import compose
from reft_core.edits import PARTS, Edit, Part
from reft_core.errors import InvalidRequest
from reft_core.spec import AdapterSpec, SiteSpec, TrainingSpec

MIXED = "mixed"
"""The method of an adapter mixed from several methods."""

_LOW_RANK: tuple[Part, ...] = ("down", "skip", "up", "bias")


@dataclass(frozen=True)
class Ingredient:
    """An adapter and the strength it is mixed in with."""

    adapter: Adapter
    strength: float


def mix(ingredients: Sequence[Ingredient], name: str) -> bytes:
    """The file of one adapter that equals ``ingredients`` stacked in this order.

    Base, positions, template and task must be the same in all of them. Licences that differ are
    joined by ``AND``. Raises :class:`InvalidRequest` naming what cannot be mixed, or
    :class:`AdapterFileInvalid` if the result is not a valid adapter.
    """
    _check(ingredients)
    specs = [part.adapter.spec for part in ingredients]
    sites = {site: _mixed_site(site, specs) for spec in specs for site in spec.sites}
    edits = {
        key: _padded(edit, sites[key.site], specs[0].base.hidden_size)
        for key, edit in _mixed_edits(ingredients).items()
    }
    prefixed = _the_prefixed(ingredients)
    spec = specs[0].model_copy(
        update={
            "name": name,
            "description": "Mixed from "
            + ", ".join(f"{part.adapter.spec.name} at {part.strength:g}" for part in ingredients),
            "licence": _licence([spec.licence for spec in specs]),
            "method": specs[0].method if len({spec.method for spec in specs}) == 1 else MIXED,
            "dtype": "float32",
            "sites": sites,
            "prefix": prefixed.spec.prefix if prefixed else None,
            "strength": 1.0,
            "training": _provenance(ingredients),
        }
    )
    return encode_adapter(spec, edits, prefixed.prefix if prefixed else None)


def _check(ingredients: Sequence[Ingredient]) -> None:
    """Refuse what a mix would lose, and adapters that differ in what it has once."""
    if len(ingredients) < 2:
        raise InvalidRequest.because("adapters", len(ingredients), "at least 2 to mix")
    for part in ingredients:
        spec = part.adapter.spec
        if spec.head is not None:
            raise InvalidRequest.because("adapters", spec.name, "none with a head")
        if spec.subspaces:
            raise InvalidRequest.because(
                "adapters",
                spec.name,
                f"none with subspaces ({', '.join(spec.subspaces)}): mixed, their ranks could no "
                "longer be weighed one by one; stack them per request instead",
            )
        if not math.isfinite(part.strength):
            raise InvalidRequest.because("strength", part.strength, "a finite number")
    specs = [part.adapter.spec for part in ingredients]
    _same("base", [spec.base.fingerprint for spec in specs])
    for field in ("positions", "template", "task"):
        _same(field, [getattr(spec, field) for spec in specs])


def _licence(licences: Sequence[str]) -> str:
    """What a mix is under: all of its parts' licences, as an SPDX expression joins them."""
    distinct = list(dict.fromkeys(licence or "NOASSERTION" for licence in licences))
    return licences[0] if len(distinct) == 1 else " AND ".join(distinct)


def _provenance(ingredients: Sequence[Ingredient]) -> TrainingSpec:
    """Which files a mix was made from."""
    data = {
        f"adapter_{place}": f"{part.adapter.spec.name}@sha256:{part.adapter.digest}"
        for place, part in enumerate(ingredients, 1)
    }
    return TrainingSpec(tool="reft adapter mix", data=data)


def _same(field: str, values: Sequence[object]) -> None:
    """Refuse a mix whose adapters differ in ``field``."""
    for value in values[1:]:
        if value != values[0]:
            raise InvalidRequest.because(
                field,
                value,
                f"{values[0]}, as in the first adapter; stack them per request instead",
            )


def _the_prefixed(ingredients: Sequence[Ingredient]) -> Adapter | None:
    """The one adapter whose virtual tokens take part, if there is one. At strength 0 none do."""
    found = [part for part in ingredients if part.adapter.prefix is not None and part.strength]
    if len(found) > 1:
        names = [part.adapter.spec.name for part in found]
        raise InvalidRequest.because("prefix", names, "at most one adapter with virtual tokens")
    if not found:
        return None
    if found[0].strength != 1:
        raise InvalidRequest.because(
            "strength", found[0].strength, "0 or 1 for an adapter with a prefix"
        )
    return found[0].adapter


def _mixed_site(name: str, specs: Sequence[AdapterSpec]) -> SiteSpec:
    """The site's spec: every adapter's layers, ranks added up, parts united."""
    held = [spec.sites[name] for spec in specs if name in spec.sites]
    if any(site.interchange for site in held):
        raise InvalidRequest.because(
            f"sites.{name}.interchange", True, "an edit that needs no source prompt"
        )
    for field in ("phase", "source", "activation"):
        _same(f"sites.{name}.{field}", [getattr(site, field) for site in held])
    layers = sorted({layer for site in held for layer in site.layers})
    if held[0].activation != "identity" and held[0].source == "output":
        _refuse_shared_layers(name, held)
    ranks = [sum(site.rank for site in held if layer in site.layers) for layer in layers]
    parts = {part for site in held for part in site.parts}
    if held[0].activation == "identity":
        parts.discard("skip")  # folded into down
    if held[0].source == "output" and parts & {"shift", "bias"} and "down" in parts:
        parts.add("bias")  # what one adapter shifts, the next one's down reads
    shared = held[0].model_copy(
        update={
            "layers": tuple(layers),
            "rank": max(ranks),
            "parts": tuple(part for part in PARTS if part in parts),
            "scale": 1.0,
        }
    )
    limit = min(shared.sizes(specs[0].base.hidden_size))
    if shared.rank > limit:
        raise InvalidRequest.because(
            f"sites.{name}.rank", shared.rank, f"at most {limit} when mixed"
        )
    return shared


def _refuse_shared_layers(name: str, held: Sequence[SiteSpec]) -> None:
    """Non-linear edits of an output compose to no canonical edit."""
    layers = [layer for site in held for layer in site.layers]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise InvalidRequest.because(
            f"sites.{name}",
            f"activation {held[0].activation!r} twice in layers {twice}",
            "activation 'identity' where adapters overlap; or stack them per request",
        )


def _mixed_edits(ingredients: Sequence[Ingredient]) -> Mapping[EditKey, Edit]:
    """The composed edit at every place, in the order of the stack."""
    places: dict[EditKey, list[Edit]] = {}
    for part in ingredients:
        for key, edit in part.adapter.edits.items():
            places.setdefault(key, []).append(edit.fold().times(part.strength))
    return {key: reduce(compose, edits) for key, edits in places.items()}


def _padded(edit: Edit, site: SiteSpec, hidden_size: int) -> Edit:
    """The edit with zeros up to the parts and the rank that its site declares."""
    parts: dict[str, Tensor] = {}
    for part in site.parts:
        shape = site.shape(part, hidden_size)
        padded = torch.zeros(shape)
        held: Tensor | None = getattr(edit, part)
        if held is not None:
            padded[tuple(slice(size) for size in held.shape)] = held
        parts[part] = padded
    absent: dict[str, None] = {part: None for part in _LOW_RANK if part not in parts}
    return replace(edit, **{**absent, **parts})  # type: ignore[arg-type]

"""How far an adapter's edits move states: random ones, or those of a base that reads a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import Adapter, EditKey
from reft_core.loading import LoadedModel
from reft_core.sites import SiteEdit, edit_site, find_layers

NUM_SAMPLES = 64
"""Random states that norms of Δ are measured on."""


@dataclass(frozen=True)
class DeltaNorm:
    """How far a site's edits move a state h, ‖Δ‖ / ‖h‖."""

    mean: float
    largest: float
    largest_layer: int


def delta_norms(adapter: Adapter) -> dict[str, DeltaNorm]:
    """The norm at each site, over layers, units and :data:`NUM_SAMPLES` random states; seeded.

    They have unit variance, and are no states of the base model. The default strength is
    multiplied in. Where an edit reads the site's input, that too is random, of unit variance and
    independent of h.
    """
    generator = torch.Generator().manual_seed(0)
    spec = adapter.spec
    found: dict[EditKey, float] = {}
    for name, site in spec.sites.items():
        in_size, out_size = site.sizes(spec.base.hidden_size)
        h = torch.randn(NUM_SAMPLES, out_size, generator=generator)
        x = torch.randn(NUM_SAMPLES, in_size, generator=generator)
        found |= {
            key: _relative(edit.delta(h, x), h) * abs(spec.strength)
            for key, edit in adapter.edits.items()
            if key.site == name
        }
    return _by_site(found)


@torch.inference_mode()
def delta_norms_on(
    adapter: Adapter, loaded: LoadedModel, tokens: Sequence[int]
) -> dict[str, DeltaNorm]:
    """The norm at each site, over layers and the positions of ``tokens`` that are edited there.

    The states are the base model's own as it reads the prompt, each edit acting on what the
    edits before it left, in the default strength. Virtual tokens are not put before the prompt,
    and an interchange has no source. Sites without an edited position are left out.
    """
    units = adapter.rule.resolve(len(tokens))
    found: dict[EditKey, float] = {}

    def edit_at(place: tuple[int, str]) -> SiteEdit:
        keys = [key for key in adapter.edits if (key.layer, key.site) == place and units[key.unit]]

        def edit(h: Tensor, x: Tensor) -> Tensor:
            edited = h.reshape(len(tokens), -1).float().clone()  # (T, d)
            read = x.reshape(len(tokens), -1)  # (T, d_x)
            for key in keys:
                rows = list(units[key.unit])
                delta = adapter.edits[key].delta(edited[rows], read[rows]) * adapter.spec.strength
                found[key] = _relative(delta, edited[rows])
                edited[rows] += delta
            return edited.to(h.dtype).view_as(h)

        return edit

    model: Any = loaded.model
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    layers = find_layers(model, loaded.description.num_layers)
    with ExitStack() as stack:
        for place in dict.fromkeys((key.layer, key.site) for key in adapter.edits):
            layer, site = place
            stack.callback(edit_site(layers[layer], site, edit_at(place)).remove)
        model(input_ids=torch.tensor([list(tokens)], device=model.device))
    return _by_site(found)


def _relative(delta: Tensor, h: Tensor) -> float:
    """Mean of ‖Δ‖ / ‖h‖ over rows, for Δ and h (N, d)."""
    return float((delta.norm(dim=1) / h.norm(dim=1).clamp_min(1e-12)).mean())


def _by_site(found: Mapping[EditKey, float]) -> dict[str, DeltaNorm]:
    """The norms of single edits, put together for each site."""
    norms = {}
    for site in dict.fromkeys(key.site for key in found):
        here = {key: norm for key, norm in found.items() if key.site == site}
        largest = max(here, key=lambda key: here[key])
        norms[site] = DeltaNorm(sum(here.values()) / len(here), here[largest], largest.layer)
    return norms

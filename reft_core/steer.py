"""Steering vectors computed from prompts: the difference of what two sets of them make of a state.

With one prompt on each side this is activation addition (Turner et al. 2023, arXiv 2308.10248);
with many, the difference of means of contrastive activation addition (Panickssery et al. 2023,
arXiv 2312.06681). Nothing is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reft_core.adapter import EditKey, encode_adapter
from reft_core.edits import Edit
from reft_core.errors import InvalidRequest, PromptTooLong, explain
from reft_core.loading import LoadedModel
from reft_core.methods.base import Phase
from reft_core.methods.placement import Placement
from reft_core.positions import PositionRule
from reft_core.sites import SiteEdit, edit_site, find_layers
from reft_core.spec import AdapterSpec, PositionSpec, TrainingSpec
from reft_core.threads import run_in_own_thread

Prompts = Sequence[Sequence[int]]
"""Prompts in token ids."""


def steer(
    loaded: LoadedModel,
    positive: Prompts,
    negative: Prompts,
    *,
    name: str,
    layers: tuple[int, ...],
    sites: tuple[str, ...] | None = None,
    read: str = "l1",
    positions: str = "prompt",
    phase: Phase | None = None,
) -> bytes:
    """The file of an adapter that adds mean(positive) − mean(negative) at ``positions``.

    The means are of the base model's states at ``layers`` and ``sites`` (``block_output`` unless
    others are named), first over the positions that the rule ``read`` draws on a prompt, then
    over the prompts. Raises :class:`InvalidRequest` naming what cannot be: a site or layer that
    the model lacks, no prompts, a prompt on which ``read`` draws nothing, vectors of zeros.
    """
    model = loaded.description
    placement = Placement.on(model, "steering", layers=layers, sites=sites, phase=phase)
    keys = [EditKey(layer, site, 0) for site in placement.sites for layer in placement.layers]
    rule = PositionRule.parse(read)
    for_, against = run_in_own_thread(
        lambda: (
            _mean(loaded, "positive", positive, keys, rule),
            _mean(loaded, "negative", negative, keys, rule),
        )
    )
    edits = {key: Edit(shift=for_[key] - against[key]) for key in keys}
    if not any(bool(edit.shift.any()) for edit in edits.values() if edit.shift is not None):
        raise InvalidRequest.because("negative", "states like those of positive", "other prompts")
    spec = AdapterSpec(
        name=name,
        description=f"Steering from {len(positive)} prompts against {len(negative)}",
        base=model.to_base_spec(),
        method="steering",
        positions=PositionSpec(rule=str(PositionRule.parse(positions))),
        sites=placement.site_specs(),
        training=TrainingSpec(
            tool="reft adapter steer",
            data={
                "positive_sha256": _digest(positive),
                "positive_rows": len(positive),
                "negative_sha256": _digest(negative),
                "negative_rows": len(negative),
            },
            hyperparameters={"read": str(rule)},
        ),
    )
    return encode_adapter(spec, edits)


@torch.inference_mode()
def _mean(
    loaded: LoadedModel, side: str, prompts: Prompts, keys: Sequence[EditKey], rule: PositionRule
) -> Mapping[EditKey, Tensor]:
    """Mean state (d,) at each place over the prompts of one side, float32, on the CPU."""
    if not prompts:
        raise InvalidRequest.because(side, 0, "at least one prompt")
    layers = find_layers(loaded.model)
    sums: dict[EditKey, Tensor] = {}
    for place, prompt in enumerate(prompts):
        most = loaded.description.max_positions
        if len(prompt) > most:
            allowed = f"at most {most}"
            raise PromptTooLong(explain(f"{side}[{place}]", f"{len(prompt)} tokens", allowed))
        read = [position for unit in rule.resolve(len(prompt)) for position in unit]
        if not read:
            allowed = f"a prompt on which {str(rule)!r} draws a position"
            raise InvalidRequest.because(f"{side}[{place}]", f"{len(prompt)} tokens", allowed)
        handles = [edit_site(layers[key.layer], key.site, _adder(sums, key, read)) for key in keys]
        try:
            ids = torch.tensor([list(prompt)], device=loaded.model.device)
            loaded.model.base_model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return {key: total / len(prompts) for key, total in sums.items()}


def _adder(sums: dict[EditKey, Tensor], key: EditKey, read: Sequence[int]) -> SiteEdit:
    """A hook that adds a site's mean over ``read`` to the sum at ``key`` and changes nothing."""

    def add(h: Tensor, _x: Tensor) -> Tensor:
        state = h[0, list(read)].float().mean(0).cpu()  # (d,)
        sums[key] = sums[key] + state if key in sums else state
        return h

    return add


def _digest(prompts: Prompts) -> str:
    """SHA-256 of prompts in tokens."""
    return hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()

"""The slowest way to a trained model's states and gradients: one text, one loop over positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reft_core.positions import PositionRule
from reft_core.sites import edit_site
from trainer.interventions import Interventions


@contextmanager
def edited_row_by_row(
    layers: list[nn.Module], interventions: Interventions, rule: PositionRule, length: int
) -> Iterator[None]:
    """While open, the layers edit one unpadded text of ``length`` tokens, state by state."""
    units = rule.resolve(length)
    with ExitStack() as stack:
        for key, intervention in interventions.by_key():

            def edit(
                hidden: Tensor,
                x: Tensor,
                intervention: Any = intervention,
                positions: tuple[int, ...] = units[key.unit],
            ) -> Tensor:
                states = list(hidden[0])
                for position in positions:
                    h = states[position].unsqueeze(0)
                    read = x[0, position].unsqueeze(0) if intervention.source == "input" else h
                    states[position] = (h + intervention(h, read))[0]
                return torch.stack(states).unsqueeze(0)

            stack.callback(edit_site(layers[key.layer], key.site, edit).remove)
        yield


def gradients(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """All gradients in one vector; zeros where a parameter has none."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def move(parameters: list[nn.Parameter], size: float = 0.2) -> None:
    """Take parameters well away from where they start."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn_like(parameter))

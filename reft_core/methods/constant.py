"""What the methods share whose Δ is the same for every state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import Intervention, SiteSizes


class Constant(Intervention):
    """Δ = v with v (d,), which starts at zero. No rank and no activation."""

    activations = ("identity",)
    has_rank = False

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.vector = nn.Parameter(torch.zeros(sizes.out_size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.vector.expand_as(h)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(shift=self.vector.clone())

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("shift",)

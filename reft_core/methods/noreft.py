"""NoReFT: LoReFT without the orthogonality constraint. As in pyreft's ablation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part, activate
from reft_core.methods.base import Intervention, SiteSizes, linear_init


class NoReFT(Intervention):
    """Δ(h) = (act(h·W₁ᵀ + b) − h·W₂ᵀ)·W₂ with free W₁, W₂ (r, d) and b (r,).

    Starts as pyreft's ``NoreftIntervention``: W₁ and b are drawn as a linear layer's weight and
    bias, W₂ as another's weight. The untrained edit is a random one.
    """

    method = "noreft"
    equation = "(act(hW₁ᵀ + b) − hW₂ᵀ)W₂"
    citation = "pyreft 0.1.0, NoreftIntervention"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        size = sizes.out_size
        self.weight = nn.Parameter(linear_init(size, rank, size))
        self.bias = nn.Parameter(linear_init(size, rank))
        self.projection = nn.Parameter(linear_init(size, rank, size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        source = activate(self.activation, F.linear(h, self.weight, self.bias))  # (N, r)
        return (source - F.linear(h, self.projection)) @ self.projection  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.weight.mT.clone(),
            skip=self.projection.mT.clone(),
            up=self.projection.clone(),
            bias=self.bias.clone(),
            activation=self.activation,
        ).fold()

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        if activation == "identity":
            return ("down", "up", "bias")
        return ("down", "skip", "up", "bias")

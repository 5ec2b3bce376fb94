"""DiReFT: LoReFT without the difference. Wu et al. 2024 (arXiv 2404.03592), §3.2, eq. 3.

Two forms go by this name and differ in their constraint, so they carry different names
here: ``direft`` is the paper's, with a free up-projection; ``direft_orthonormal`` is what
pyreft's ``DireftIntervention`` computes, with orthonormal columns in R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part, activate
from reft_core.methods.base import Intervention, SiteSizes, linear_init


class DiReFT(Intervention):
    """Δ(h) = act(h·W₁ᵀ + b)·W₂ with free W₁, W₂ (r, d) and b (r,).

    pyreft's ``NodireftIntervention`` draws W₁, b and W₂ as a linear layer's. Here W₁ alone is;
    b and W₂ start at zero, as LoRA's B does, so that the untrained edit changes nothing.
    """

    method = "direft"
    equation = "act(hW₁ᵀ + b)W₂"
    citation = "arXiv 2404.03592, eq. 3"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        size = sizes.out_size
        self.weight = nn.Parameter(linear_init(size, rank, size))
        self.bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(rank, size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        inner = activate(self.activation, F.linear(h, self.weight, self.bias))  # (N, r)
        return inner @ self.up  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.weight.mT.clone(),
            up=self.up.clone(),
            bias=self.bias.clone(),
            activation=self.activation,
        )

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up", "bias")

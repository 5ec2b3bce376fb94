"""ConsReFT: LoReFT whose source is a learnt constant. As in pyreft's ablation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import Intervention, SiteSizes, orthonormal_init, orthonormalise


class ConsReFT(Intervention):
    """Δ(h) = (s − h·R)·Rᵀ: the subspace spanned by R (d, r) is set to s (r,).

    R starts orthonormal and s uniform in [0, 1), as pyreft draws them. There is no
    activation, so only the identity is accepted.
    """

    method = "consreft"
    equation = "(s − hR)Rᵀ, RᵀR = I"
    citation = "pyreft 0.1.0, ConsreftIntervention"
    activations = ("identity",)

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        size = sizes.out_size
        self.basis = nn.Parameter(orthonormal_init(size, rank))  # (d, r)
        self.target = nn.Parameter(torch.rand(rank))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        rotation = orthonormalise(self.basis)
        return (self.target - h @ rotation) @ rotation.mT  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        rotation = orthonormalise(self.basis)
        return Edit(down=-rotation, up=rotation.mT, bias=self.target.clone())

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up", "bias")

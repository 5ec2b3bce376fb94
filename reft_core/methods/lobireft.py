"""LobiReFT: a learnt bias in a low-rank subspace. As in pyreft's ablation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import Intervention, SiteSizes, orthonormal_init, orthonormalise


class LobiReFT(Intervention):
    """Δ(h) = s·Rᵀ: a learnt bias confined to the subspace spanned by R (d, r); s (r,).

    R starts orthonormal and s uniform in [0, 1), as pyreft draws them. It folds to one
    vector of d numbers.
    """

    method = "lobireft"
    equation = "sRᵀ, RᵀR = I"
    citation = "pyreft 0.1.0, LobireftIntervention"
    activations = ("identity",)

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        size = sizes.out_size
        self.basis = nn.Parameter(orthonormal_init(size, rank))  # (d, r)
        self.target = nn.Parameter(torch.rand(rank))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return (orthonormalise(self.basis) @ self.target).expand_as(h)  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(shift=orthonormalise(self.basis) @ self.target)

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("shift",)

    @classmethod
    @override
    def stored_rank(cls, rank: int, sizes: SiteSizes) -> int:
        return 0

"""LobiReFT: a learnt bias in a low-rank subspace. As in pyreft's ablation."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import SiteSizes
from reft_core.methods.rotated import Targeted


class LobiReFT(Targeted):
    """Δ(h) = s·Rᵀ: a learnt bias confined to the subspace spanned by R (d, r); s (r,).

    Starts as pyreft's ``LobireftIntervention``: R orthonormal, s uniform in [0, 1). It folds to
    one vector of d numbers.
    """

    method = "lobireft"
    equation = "sRᵀ, RᵀR = I"
    citation = "pyreft 0.1.0, LobireftIntervention"

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return (self.rotation() @ self.target).expand_as(h)  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(shift=self.rotation() @ self.target)

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("shift",)

    @classmethod
    @override
    def stored_rank(cls, rank: int, sizes: SiteSizes) -> int:
        return 0

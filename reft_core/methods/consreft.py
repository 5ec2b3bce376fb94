"""ConsReFT: LoReFT whose source is a learnt constant. As in pyreft's ablation."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.rotated import Targeted


class ConsReFT(Targeted):
    """Δ(h) = (s − h·R)·Rᵀ: the subspace spanned by R (d, r) is set to s (r,).

    Starts as pyreft's ``ConsreftIntervention``: R orthonormal, s uniform in [0, 1). There is no
    activation, so only the identity is accepted.
    """

    method = "consreft"
    equation = "(s − hR)Rᵀ, RᵀR = I"
    citation = "pyreft 0.1.0, ConsreftIntervention"

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        rotation = self.rotation()
        return (self.target - h @ rotation) @ rotation.mT  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        rotation = self.rotation()
        return Edit(down=-rotation, up=rotation.mT, bias=self.target.clone())

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up", "bias")

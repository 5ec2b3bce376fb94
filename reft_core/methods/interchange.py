"""Distributed interchange intervention. Geiger et al. 2023 (arXiv 2303.02536)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.rotated import Rotated


class Interchange(Rotated):
    """Δ(h, s) = ((s − h)·R)·Rᵀ with R (d, r) orthonormal and s (N, d) from a source prompt.

    What a subspace holds is replaced by what it holds, at the paired position, when the base
    model reads another prompt, the request's *source*. Without a source s is zero: the
    subspace is emptied (directional ablation, arXiv 2406.11717), and that is also how it is
    trained. R starts orthonormal, as pyvene's ``LowRankRotatedSpaceIntervention`` draws it.
    """

    method = "interchange"
    equation = "((s − h)R)Rᵀ, RᵀR = I, s from a source prompt"
    citation = "arXiv 2303.02536, eq. 4; LoReFT's arXiv 2404.03592, eq. 1"
    activations = ("identity",)
    interchanges = True

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        rotation = self.rotation()
        return -(h @ rotation) @ rotation.mT  # (N, d), with s = 0

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        rotation = self.rotation()
        return Edit(down=-rotation, up=rotation.mT)

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up")

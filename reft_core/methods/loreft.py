"""LoReFT: low-rank linear subspace edit. Wu et al. 2024 (arXiv 2404.03592), eq. 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part, activate
from reft_core.methods.base import SiteSizes
from reft_core.methods.rotated import Rotated


class LoReFT(Rotated):
    """Δ(h) = (act(h·Wᵀ + b) − h·R)·Rᵀ with orthonormal columns in R.

    R (d, r), W (r, d), b (r,). The paper's act is the identity, for which the edit folds to
    (h·(Wᵀ − R) + b)·Rᵀ.

    Starts as pyreft's ``LoreftIntervention_IdentityInit``: R orthonormal, W = Rᵀ, b = 0, so that
    with the identity activation the untrained edit changes nothing. pyreft's older
    ``LoreftIntervention`` draws W and b as a linear layer's, and training first has to undo
    a random edit.
    """

    method = "loreft"
    equation = "(act(hWᵀ + b) − hR)Rᵀ, RᵀR = I"
    citation = "arXiv 2404.03592, eq. 2"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.weight = nn.Parameter(self.basis.detach().mT.clone())  # (r, d)
        self.bias = nn.Parameter(torch.zeros(rank))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        rotation = self.rotation()
        source = activate(self.activation, F.linear(h, self.weight, self.bias))  # (N, r)
        return (source - h @ rotation) @ rotation.mT  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        rotation = self.rotation()
        return Edit(
            down=self.weight.mT.clone(),
            skip=rotation,
            up=rotation.mT,
            bias=self.bias.clone(),
            activation=self.activation,
        ).fold()

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        if activation == "identity":
            return ("down", "up", "bias")
        return ("down", "skip", "up", "bias")

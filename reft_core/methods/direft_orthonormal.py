"""DiReFT with orthonormal columns in R, as pyreft codes it. See also ``direft.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part, activate
from reft_core.methods.base import SiteSizes, linear_init
from reft_core.methods.rotated import Rotated


class DiReFTOrthonormal(Rotated):
    """Δ(h) = act(h·Wᵀ + b)·Rᵀ with orthonormal columns in R (d, r); W (r, d), b (r,).

    R starts orthonormal, as in pyreft's ``DireftIntervention``. That draws W and b as a linear
    layer's, which makes its untrained edit a random one; here they start at zero, so with an
    activation that maps 0 to 0 the untrained edit changes nothing. Under relu, whose gradient
    at 0 is 0, W is drawn as in pyreft.
    """

    method = "direft_orthonormal"
    equation = "act(hWᵀ + b)Rᵀ, RᵀR = I"
    citation = "pyreft 0.1.0, DireftIntervention"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        size = sizes.out_size
        # From zero relu would never learn.
        start = linear_init(size, rank, size) if activation == "relu" else torch.zeros(rank, size)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(rank))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        inner = activate(self.activation, F.linear(h, self.weight, self.bias))  # (N, r)
        return inner @ self.rotation().mT  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.weight.mT.clone(),
            up=self.rotation().mT,
            bias=self.bias.clone(),
            activation=self.activation,
        )

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up", "bias")

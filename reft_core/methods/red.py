"""RED: representation editing by a learnt scale and bias. Wu et al. 2024 (arXiv 2402.15179)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import Intervention, SiteSizes


class RED(Intervention):
    """h becomes h∘l + b, so Δ(h) = (l − 1)∘h + b with l, b (d,).

    l starts at one and b at zero, as in the paper's code. It has no rank and no activation.
    """

    method = "red"
    equation = "(l − 1)∘h + b"
    citation = "arXiv 2402.15179, eq. 2"
    activations = ("identity",)
    has_rank = False

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        size = sizes.out_size
        self.scaling = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return (self.scaling - 1) * h + self.bias

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(gain=self.scaling - 1, shift=self.bias.clone())

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("shift", "gain")

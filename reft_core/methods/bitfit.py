"""BitFit: trained biases. Ben Zaken et al. 2022 (arXiv 2106.10199)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import Intervention, SiteSizes


class BitFit(Intervention):
    """Δ = b (d_out,): a trained bias on linear maps (Ben Zaken et al. 2022).

    BitFit trains the biases a model has; added to the frozen ones this is the same, and it
    serves models without biases as well. Starts at zero.
    """

    method = "bitfit"
    equation = "b"
    citation = "arXiv 2106.10199"
    activations = ("identity",)
    sites = ("linear",)
    phase = "all"
    has_rank = False

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.bias = nn.Parameter(torch.zeros(sizes.out_size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.bias.expand_as(h)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(shift=self.bias.clone())

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("shift",)

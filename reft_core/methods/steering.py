"""Steering vectors, also called activation addition. Turner et al. 2023 (arXiv 2308.10248)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import Intervention, SiteSizes


class Steering(Intervention):
    """Δ(h) = v with v (d,), scaled by the request's strength.

    v starts at zero. The paper takes it as a difference of activations on two prompts; here
    it can also be trained. It has no rank and no activation.
    """

    method = "steering"
    equation = "v"
    citation = "arXiv 2308.10248, §3"
    activations = ("identity",)
    has_rank = False

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        size = sizes.out_size
        self.vector = nn.Parameter(torch.zeros(size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.vector.expand_as(h)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(shift=self.vector.clone())

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("shift",)

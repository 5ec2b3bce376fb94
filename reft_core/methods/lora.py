"""LoRA: a low-rank update of a linear map. Hu et al. 2021 (arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part
from reft_core.methods.base import Intervention, SiteSizes


class LoRA(Intervention):
    """Δ(h, x) = s·(x·Aᵀ)·Bᵀ for a linear map h = x·W; A (r, d_in), B (d_out, r).

    s is fixed by the config: α/r, or α/√r in its rank-stabilised form (arXiv 2312.03732).
    Starts as in the paper's loralib: A Kaiming uniform with a = √5, B zero.
    """

    method = "lora"
    equation = "s·(xAᵀ)Bᵀ"
    citation = "arXiv 2106.09685, §4.1"
    activations = ("identity",)
    sites = ("linear",)
    source = "input"
    phase = "all"
    has_scale = True

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.down = nn.Parameter(torch.empty(rank, self.x_size))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(sizes.out_size, rank))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale  # (N, d_out)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.down.mT.clone(), up=self.up.mT.clone(), scale=self.scale, source="input"
        ).fold()

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up")

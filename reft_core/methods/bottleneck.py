"""What the bottleneck adapters share.

He et al. 2022 (arXiv 2110.04366) write them as one function, Δ = s·(act(x·W_down + b)·W_up + b'),
that differs in what x is and what it is added to. In the canonical edit b' becomes ``shift``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from reft_core.edits import Activation, Edit, Part, activate
from reft_core.methods.base import Intervention, SiteSizes


class Bottleneck(Intervention):
    """s·act(x·W_down + b_down)·W_up + s·b_up; subclasses say what x is.

    Starts as He et al.'s code does with its option ``lora``, which their scripts set for parallel
    adapters: W_down Kaiming uniform with a = √5, the rest zero, so that the untrained adapter
    changes nothing.
    """

    activations = ("relu", "gelu", "silu", "tanh", "sigmoid", "identity")
    sites: ClassVar[tuple[str, ...]] = ("mlp_output", "attn_output")
    phase = "all"

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "relu") -> None:
        super().__init__(sizes, rank, activation)
        self.down = nn.Parameter(torch.empty(rank, self.x_size))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.down_bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(sizes.out_size, rank))
        self.up_bias = nn.Parameter(torch.zeros(sizes.out_size))

    @override
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        read = x if self.source == "input" else h
        inner = activate(self.activation, F.linear(read, self.down, self.down_bias))  # (N, r)
        return F.linear(inner, self.up, self.up_bias) * self.scale  # (N, d)

    @override
    @torch.no_grad()
    def to_edit(self) -> Edit:
        return Edit(
            down=self.down.mT.clone(),
            up=self.up.mT.clone() * self.scale,
            bias=self.down_bias.clone(),
            shift=self.up_bias * self.scale,
            activation=self.activation,
            source=self.source,
        )

    @classmethod
    @override
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        return ("down", "up", "bias", "shift")

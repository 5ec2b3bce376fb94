"""What every method is: a small trainable module that ends as a canonical edit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from reft_core.edits import ACTIVATION_NAMES, Activation, Edit, Part, Source

Phase = Literal["prompt", "all"]


@dataclass(frozen=True)
class SiteSizes:
    """Widths at one site: of its input and of its output; and the size of one head there."""

    in_size: int
    out_size: int
    head_dim: int = 0


class Intervention(nn.Module, ABC):
    """One trainable edit, for one layer, site and unit.

    Parameters live in float32. ``forward`` returns the edit's Δ and is differentiable;
    ``to_edit`` freezes it into the form that is stored and served. Both must agree:
    ``to_edit().delta(h, x)`` equals ``forward(h, x)`` up to float32 rounding.

    Class variables say what a method is. The defaults are those of ReFT: an edit of the
    residual stream that reads the state it changes and touches prompt positions only.
    """

    method: ClassVar[str]
    """Name in configs, adapter files and :data:`reft_core.methods.METHODS`."""
    equation: ClassVar[str]
    """Δ in the letters of the source, for people."""
    citation: ClassVar[str]
    """Where the equation comes from."""
    activations: ClassVar[tuple[Activation, ...]] = ACTIVATION_NAMES
    """Those it accepts; the first is its default."""
    sites: ClassVar[tuple[str, ...]] = ("block_output",)
    """Sites it is meant for; the first is its default."""
    source: ClassVar[Source] = "output"
    """What it reads; see :mod:`reft_core.edits`."""
    phase: ClassVar[Phase] = "prompt"
    """Whether it edits generated tokens too, unless a config says otherwise."""
    has_rank: ClassVar[bool] = True
    """Whether its rank is a choice."""
    interchanges: ClassVar[bool] = False
    """Whether it takes states of a source prompt, which a request brings."""
    has_scale: ClassVar[bool] = False
    """Whether Δ has a fixed factor s that is a choice, held in ``scale``."""

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__()
        assert activation in self.activations, f"{self.method} has no activation {activation}"
        most = min(sizes.in_size, sizes.out_size)
        assert not self.has_rank or 1 <= rank <= most, f"rank {rank} at a site of width {most}"
        self.sizes = sizes
        self.rank = rank
        self.activation: Activation = activation
        self.scale = 1.0

    @abstractmethod
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Δ for a site's output h (N, d) and its input x (N, d_x), in float32; (N, d).

        Methods whose :attr:`source` is ``output`` do not look at x.
        """

    @abstractmethod
    def to_edit(self) -> Edit:
        """The canonical edit with the present parameters, detached, float32, folded."""

    @classmethod
    @abstractmethod
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        """Tensors that ``to_edit`` yields for this activation, in the file's order."""

    @classmethod
    def stored_rank(cls, rank: int, sizes: SiteSizes) -> int:
        """Rank of the edit that ``to_edit`` yields: 0 when it has no low-rank part."""
        return rank if cls.has_rank else 0

    @property
    def x_size(self) -> int:
        """Width of what the edit reads."""
        return self.sizes.in_size if self.source == "input" else self.sizes.out_size

    @property
    def num_trainable(self) -> int:
        """Numbers the optimiser may change."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def linear_init(num_inputs: int, *shape: int) -> Tensor:
    """A tensor drawn as torch's linear layer of ``num_inputs`` draws its weight and its bias."""
    bound = 1 / math.sqrt(num_inputs)
    return torch.empty(shape).uniform_(-bound, bound)

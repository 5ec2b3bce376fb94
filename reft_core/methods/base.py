"""What every method is: a small trainable module that ends as a canonical edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from reft_core.edits import Activation, Edit, Part


class Intervention(nn.Module, ABC):
    """One trainable edit of hidden states, for one layer and one unit.

    Parameters live in float32. ``forward`` returns the edit's Δ and is differentiable;
    ``to_edit`` freezes it into the form that is stored and served. Both must agree:
    ``to_edit().delta(h)`` equals ``forward(h)`` up to float32 rounding.
    """

    method: ClassVar[str]
    """Name in configs, adapter files and :data:`reft_core.methods.METHODS`."""

    equation: ClassVar[str]
    """Δ in the letters of :mod:`reft_core.edits`' paper sources, for people."""

    source: ClassVar[str]
    """Where the equation comes from."""

    def __init__(self, hidden_size: int, rank: int, activation: Activation = "identity") -> None:
        super().__init__()
        assert 1 <= rank <= hidden_size, f"rank {rank} of hidden size {hidden_size}"
        self.hidden_size = hidden_size
        self.rank = rank
        self.activation: Activation = activation

    @abstractmethod
    def forward(self, h: Tensor) -> Tensor:
        """Δ(h) for hidden states h (N, d) in float32; (N, d)."""

    @abstractmethod
    def to_edit(self) -> Edit:
        """The canonical edit with the present parameters, detached, float32, folded."""

    @classmethod
    @abstractmethod
    def parts(cls, activation: Activation) -> tuple[Part, ...]:
        """Tensors that ``to_edit`` yields for this activation, in the file's order."""

    @property
    def num_trainable(self) -> int:
        """Numbers the optimiser may change."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def orthonormal_init(hidden_size: int, rank: int) -> Tensor:
    """A random (d, r) float32 matrix with orthonormal columns, from torch's generator."""
    q, _ = torch.linalg.qr(torch.randn(hidden_size, rank))
    return q


def orthonormalise(a: Tensor) -> Tensor:
    """Orthonormal columns spanning those of ``a`` (d, r), by Cholesky-QR, differentiable.

    R = A·L⁻ᵀ with L·Lᵀ = AᵀA, so RᵀR = I whatever the length of A's columns: weight decay
    and large steps cannot destroy it. One r×r Cholesky factor and one triangular solve
    cost far less than a Householder or matrix-exponential parametrisation, and A of a
    trained intervention is well conditioned (it starts orthonormal).
    """
    factor = torch.linalg.cholesky(a.mT @ a)  # (r, r), lower
    return torch.linalg.solve_triangular(factor, a.mT, upper=False).mT  # (d, r)

"""Methods that edit within a subspace, spanned by orthonormal columns that training cannot lose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reft_core.edits import Activation
from reft_core.methods.base import Intervention, SiteSizes


class Rotated(Intervention):
    """A method with R (d, r), RᵀR = I: :meth:`rotation` of its parameter ``basis`` (d, r).

    R starts as torch's ``orthogonal_`` draws it, as in pyreft and pyvene.
    """

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.basis = nn.Parameter(orthonormal_init(sizes.out_size, rank))  # (d, r)

    def rotation(self) -> Tensor:
        """R (d, r), its columns orthonormal, differentiable."""
        return orthonormalise(self.basis)


class Targeted(Rotated):
    """A rotated method that knows one point s (r,) of its subspace, whatever the state.

    s starts uniform in [0, 1), as pyreft draws it: the untrained edit is a random one.
    """

    activations = ("identity",)

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.target = nn.Parameter(torch.rand(rank))


def orthonormal_init(size: int, rank: int) -> Tensor:
    """A random (d, r) float32 matrix with orthonormal columns, uniform among them."""
    return torch.nn.init.orthogonal_(torch.empty(size, rank))


def orthonormalise(a: Tensor) -> Tensor:
    """Orthonormal columns spanning those of ``a`` (d, r), by Cholesky-QR, differentiable.

    R = A·L⁻ᵀ with L·Lᵀ = AᵀA, so RᵀR = I whatever the length of A's columns: weight decay
    and large steps cannot destroy it. An r×r Cholesky factor and a triangular solve cost far
    less than a Householder or matrix-exponential parametrisation. Done twice, because once
    leaves an error that grows with the square of A's condition number: a few long steps with
    r near d brought RᵀR to 10 % off I, and the second pass brings it back to rounding.
    """
    for _ in range(2):
        factor = torch.linalg.cholesky(a.mT @ a)  # (r, r), lower
        a = torch.linalg.solve_triangular(factor, a.mT, upper=False).mT  # (d, r)
    return a

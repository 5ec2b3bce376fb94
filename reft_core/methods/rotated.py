"""Methods that edit within a subspace, spanned by orthonormal columns that training cannot lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reft_core.edits import Activation
from reft_core.methods.base import Intervention, SiteSizes


class Rotated(Intervention):
    """A method with R (d, r), RᵀR = I: :meth:`rotation` of its parameter ``basis`` (d, r).

    R starts as torch's ``orthogonal_`` draws it, as in pyreft and pyvene.
    """

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.basis = nn.Parameter(orthonormal_init(sizes.out_size, rank))  # (d, r)
        self._shared: Tensor | None = None

    def rotation(self) -> Tensor:
        """R (d, r), its columns orthonormal, differentiable."""
        if parametrize.is_parametrized(self, "basis"):
            return self.basis
        return orthonormalise(self.basis) if self._shared is None else self._shared


class Targeted(Rotated):
    """A rotated method that knows one point s (r,) of its subspace, whatever the state.

    s starts uniform in [0, 1), as pyreft draws it: the untrained edit is a random one.
    """

    activations = ("identity",)

    def __init__(self, sizes: SiteSizes, rank: int, activation: Activation = "identity") -> None:
        super().__init__(sizes, rank, activation)
        self.target = nn.Parameter(torch.rand(rank))


@contextmanager
def rotating_together(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the rotated ones of ``modules`` have R from one batched product.

    An adapter has one basis a layer, and each product is far too small to fill a processor. The
    parameters must not change meanwhile.
    """
    alike: dict[tuple[int, ...], list[Rotated]] = {}
    for module in modules:
        if isinstance(module, Rotated) and not parametrize.is_parametrized(module, "basis"):
            alike.setdefault(tuple(module.basis.shape), []).append(module)
    try:
        for rotated in alike.values():
            rotations = orthonormalise(torch.stack([module.basis for module in rotated]))
            for module, rotation in zip(rotated, rotations.unbind(), strict=True):
                module._shared = rotation
        yield
    finally:
        for module in (module for rotated in alike.values() for module in rotated):
            module._shared = None


def rotate_by_torch(module: Rotated) -> None:
    """Let ``module`` have R by torch's ``orthogonal`` parametrisation instead, as pyreft has it.

    Both reach every R, but steps of the same optimiser lead along other paths. This one is for
    following pyreft's: it is several times as slow, and weight decay must be kept away from it,
    which destroys R in one step.
    """
    nn.utils.parametrizations.orthogonal(module, "basis")


def orthonormal_init(size: int, rank: int) -> Tensor:
    """A random (d, r) float32 matrix with orthonormal columns, uniform among them."""
    return torch.nn.init.orthogonal_(torch.empty(size, rank))


def orthonormalise(a: Tensor) -> Tensor:
    """Orthonormal columns spanning those of ``a`` (..., d, r), by Cholesky-QR, differentiable.

    R = A·L⁻ᵀ with L·Lᵀ = AᵀA, so RᵀR = I whatever the length of A's columns: weight decay
    and large steps cannot destroy it. An r×r Cholesky factor and a triangular solve cost far
    less than a Householder or matrix-exponential parametrisation. Done twice, because once
    leaves an error that grows with the square of A's condition number: a few long steps with
    r near d brought RᵀR to 10 % off I, and the second pass brings it back to rounding.
    """
    for _ in range(2):
        factor = torch.linalg.cholesky(a.mT @ a)  # (..., r, r), lower
        a = torch.linalg.solve_triangular(factor, a.mT, upper=False).mT  # (..., d, r)
    return a

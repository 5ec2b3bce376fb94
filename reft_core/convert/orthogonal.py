"""The orthogonal parametrisation of torch, which several libraries store R in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from reft_core.convert.tensor_file import TensorFile
from reft_core.edits import Edit


def rebuild_orthogonal(source: TensorFile, prefix: str, d: int, r: int) -> Tensor:
    """R (d, r) from what ``torch.nn.utils.parametrizations.orthogonal`` saved under ``prefix``.

    Stored are X, ``original``, as (d, r), or as (r, d) where the weight itself lies down, and B
    (d, d), ``0.base``. For r < d, with A = tril(X, −1), the columns of A are Householder
    vectors: R = B · Π (I − τⱼ aⱼ aⱼᵀ) · diag(X), τⱼ = 2 / (1 + ‖aⱼ‖²), and the diagonal is
    truncated to integers, as torch does. For r = d torch takes the exponential map instead:
    R = B · exp(tril(X) − tril(X)ᵀ). Weight decay takes the diagonal below 1 and thereby a
    column of R to zero; the library then computes with that R, and so do we
    (:func:`rotation_error`).
    """
    original, base = f"{prefix}.original", f"{prefix}.0.base"
    lies_down = source.shape(original, 2, f"a ({d}, {r}) tensor")[0] != d
    x = source.take(original, (r, d) if lies_down else (d, r))
    if lies_down:
        x = x.mT
    if r == d:
        lower = x.tril()
        q = torch.matrix_exp(lower - lower.mT)
    else:
        a = x.tril(diagonal=-1)
        tau = 2.0 / (1.0 + (a * a).sum(dim=0))
        q = torch.linalg.householder_product(a, tau) * x.diagonal().int()
    return source.take(base, (d, d)) @ q  # (d, r)


def rotation_error(rotation: Tensor) -> float:
    """How far the columns of R (d, r) are from orthonormal: the largest entry of RᵀR − I."""
    gram = rotation.mT @ rotation
    return float((gram - torch.eye(gram.shape[0])).abs().max())


def rotation_facts(edits: Iterable[Edit]) -> dict[str, float]:
    """The provenance entry ``rotation_error``: near 0 unless training or rounding broke R.

    A converter keeps a broken R, because the source library computes with it too.
    """
    errors = [rotation_error(edit.up.mT) for edit in edits if edit.up is not None]
    return {"rotation_error": max(errors)} if errors else {}

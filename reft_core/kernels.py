"""Applies a plan's edits to hidden states."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from reft_core.batch import RowEdit


def apply_edits(hidden: Tensor, edits: Iterable[RowEdit]) -> None:
    """Change the named rows of ``hidden`` (N, d) in place: h ← h + strength · Δ(h).

    The sum is taken in float32 and rounded once to ``hidden``'s dtype. A loop over adapters,
    each two thin products on its gathered rows; the weights are never copied.
    """
    for row_edit in edits:
        h = hidden.index_select(0, row_edit.rows).float()  # (K, d)
        edited = h.add(row_edit.edit.delta(h), alpha=row_edit.strength)
        hidden.index_copy_(0, row_edit.rows, edited.to(hidden.dtype))

"""Applies a plan's edits to hidden states."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from reft_core.batch import RowEdit


def apply_edits(hidden: Tensor, x: Tensor, edits: Iterable[RowEdit]) -> None:
    """Change rows of ``hidden`` (N, d) in place, in order: h ← h + strength · Δ(h, x).

    ``x`` (N, d_x) is the site's input. The sum is taken in float32 and rounded once to
    ``hidden``'s dtype. A loop over adapters, each two thin products on its gathered rows;
    the weights are never copied.
    """
    for row_edit in edits:
        edit, rows = row_edit.edit, row_edit.rows
        h = hidden.index_select(0, rows).float()  # (K, d)
        delta = edit.delta(h, x.index_select(0, rows) if edit.source == "input" else None)
        edited = h.add(delta, alpha=row_edit.strength)
        hidden.index_copy_(0, rows, edited.to(hidden.dtype))

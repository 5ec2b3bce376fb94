"""Applies a plan's edits to hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from reft_core.batch import EditPlan, RowEdit
from reft_core.sites import edit_site


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


@contextmanager
def edited(layers: Sequence[nn.Module], plan: EditPlan) -> Iterator[None]:
    """``layers`` with ``plan``'s edits hooked in, for one forward.

    Rows of the plan count the positions of a (B, T, d) tensor row by row: b·T + t.
    """
    with ExitStack() as stack:
        for (layer, site), edits in plan.places.items():

            def edit(hidden: Tensor, x: Tensor, edits: Any = edits) -> Tensor:
                rows = hidden.view(-1, hidden.shape[-1])
                apply_edits(rows, x.reshape(len(rows), -1), edits)
                return hidden

            stack.callback(edit_site(layers[layer], site, edit).remove)
        yield

"""Applies a plan's edits to hidden states."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from reft_core.batch import EditPlan, RowEdit
from reft_core.edits import stack_edits
from reft_core.native.edits import apply_natively
from reft_core.sites import edit_site

LEAST_STACK = 3
"""Fewest edits that torch is worth stacking for, by benchmarks/kernel.py: below, the copies that
make a stack cost more than the launches it saves. Measured on a CPU; on CUDA not yet run."""

Grouped = Callable[[Tensor, Sequence[RowEdit]], bool]
"""Applies edits to hidden states, or returns False and changes nothing."""

log = logging.getLogger(__name__)


def apply_edits(hidden: Tensor, x: Tensor, edits: Iterable[RowEdit]) -> None:
    """Change rows of ``hidden`` (N, d) in place, in order: h ← h + strength · Δ(h, x).

    ``x`` (N, d_x) is the site's input. The sum is taken in float32 and rounded once to
    ``hidden``'s dtype. Compiled loops do it where there are any, by benchmarks/kernel.py the
    fastest way on a CPU; Triton's kernel on a GPU, chosen there without a measurement; else torch.
    """
    edits = list(edits)
    if apply_natively(hidden, edits):
        return
    grouped = grouped_kernel(hidden.device)
    if grouped is None or not grouped(hidden, edits):
        apply_by_torch(hidden, x, edits)


def apply_by_torch(
    hidden: Tensor, x: Tensor, edits: Iterable[RowEdit], least_stack: int = LEAST_STACK
) -> None:
    """:func:`apply_edits` of any edits on any device.

    At least ``least_stack`` edits of one depth that are alike in shape go through one batched
    product; the others one by one, each two thin products on its gathered rows.
    """
    for group in _alike(edits):
        if len(group) < least_stack:
            for row_edit in group:
                _apply(hidden, x, row_edit)
        else:
            _apply_stacked(hidden, x, group)


@cache
def grouped_kernel(device: torch.device) -> Grouped | None:
    """Triton's kernel where it runs on this device and computes what it should; tried once."""
    if device.type != "cuda":
        return None
    try:
        from reft_core import kernels_triton

        kernels_triton.check(device)
    except Exception as reason:
        log.warning("edits are applied without Triton: %s", reason)
        return None
    return kernels_triton.apply_grouped


def _alike(edits: Iterable[RowEdit]) -> Iterable[list[RowEdit]]:
    """The edits in groups that may be stacked, none moved before one of another depth."""
    groups: dict[tuple[object, ...], list[RowEdit]] = defaultdict(list)
    for place, row_edit in enumerate(edits):
        edit = row_edit.edit
        key: tuple[object, ...] = (None, place)
        if row_edit.depth is not None:
            shapes = tuple((part, tensor.shape) for part, tensor in edit.parts())
            rows = len(row_edit.rows)
            key = (row_edit.depth, rows, shapes, edit.activation, edit.scale, edit.source)
        groups[key].append(row_edit)
    return groups.values()


def _apply(hidden: Tensor, x: Tensor, row_edit: RowEdit) -> None:
    """Apply one edit to its rows."""
    edit, rows = row_edit.edit, row_edit.rows
    h = hidden.index_select(0, rows).float()  # (K, d)
    delta = edit.delta(h, x.index_select(0, rows) if edit.source == "input" else None)
    edited = h.add(delta, alpha=row_edit.strength)
    hidden.index_copy_(0, rows, edited.to(hidden.dtype))


def _apply_stacked(hidden: Tensor, x: Tensor, group: list[RowEdit]) -> None:
    """Apply A alike edits, each to its own K rows, in one batched product."""
    edit = stack_edits([row_edit.edit for row_edit in group])
    rows = torch.cat([row_edit.rows for row_edit in group])  # (A·K,)
    shape = (len(group), len(group[0].rows))
    h = hidden.index_select(0, rows).float().view(*shape, -1)  # (A, K, d)
    read = x.index_select(0, rows).view(*shape, -1) if edit.source == "input" else None
    delta = edit.delta(h, read)
    strengths = [row_edit.strength for row_edit in group]
    if any(strength != 1 for strength in strengths):
        delta = delta * h.new_tensor(strengths).view(-1, 1, 1)
    hidden.index_copy_(0, rows, (h + delta).view(len(rows), -1).to(hidden.dtype))


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

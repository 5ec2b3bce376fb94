"""Edits of many adapters in one launch on a GPU, by Triton. Imported only where they may run.

Adapters lie where they were loaded: a table holds their addresses, and nothing is copied or
stacked. One program edits sixteen rows of one adapter, the whole width of them, in two passes:
the first computes x·down + bias, the second adds what up makes of it.

Dimension letters: d hidden size, r rank, A edits, K rows of an edit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_core.batch import RowEdit
from reft_core.edits import Edit

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 16
"""Rows of a program; the least that a matrix product of Triton's takes."""
_LEAST_RANK, _MOST_RANK = 16, 128
_TILE = 2048
"""Numbers of an adapter that a program holds at once. Chosen for small code; not measured."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


# Triton compiles annotations too, so what it does not know must not stand there.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _edit_rows(  # type: ignore[no-untyped-def]
    hidden,
    row_stride,
    table,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    COLS: tl.constexpr,
):
    """hidden[rows] += strength · ((hidden[rows]·down + bias)·up) of one entry and row block."""
    entry = table + tl.program_id(0) * 8
    down = tl.load(entry).to(tl.pointer_type(tl.float32))  # (d, r)
    up = tl.load(entry + 1).to(tl.pointer_type(tl.float32))  # (r, d)
    bias_address = tl.load(entry + 2)
    bias = bias_address.to(tl.pointer_type(tl.float32))  # (r,) or (K, r)
    rows = tl.load(entry + 3).to(tl.pointer_type(tl.int64))  # (K,)
    num_rows = tl.load(entry + 4)
    rank = tl.load(entry + 5)
    bias_stride = tl.load(entry + 6)
    strength = tl.load(entry + 7).to(tl.int32).to(tl.float32, bitcast=True)

    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = place < num_rows
    row = tl.load(rows + place, mask=is_row, other=0)
    starts = hidden + row[:, None] * row_stride
    j = tl.arange(0, RANK)
    is_rank = j < rank

    inner = tl.load(
        bias + place[:, None] * bias_stride + j[None, :],
        mask=is_row[:, None] & is_rank[None, :] & (bias_address != 0),
        other=0.0,
    )  # (ROWS, RANK)
    for first in range(0, SIZE, COLS):
        column = first + tl.arange(0, COLS)
        is_column = column < SIZE
        h = tl.load(
            starts + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
        ).to(tl.float32)
        weights = tl.load(
            down + column[:, None] * rank + j[None, :],
            mask=is_column[:, None] & is_rank[None, :],
            other=0.0,
        )
        inner = tl.dot(h, weights, inner, input_precision="ieee")
    for first in range(0, SIZE, COLS):
        column = first + tl.arange(0, COLS)
        is_column = column < SIZE
        is_state = is_row[:, None] & is_column[None, :]
        h = tl.load(starts + column[None, :], mask=is_state, other=0.0).to(tl.float32)
        weights = tl.load(
            up + j[:, None] * SIZE + column[None, :],
            mask=is_rank[:, None] & is_column[None, :],
            other=0.0,
        )
        h += strength * tl.dot(inner, weights, input_precision="ieee")
        tl.store(starts + column[None, :], h.to(hidden.dtype.element_ty), mask=is_state)


def apply_grouped(hidden: Tensor, edits: Sequence[RowEdit]) -> bool:
    """Change rows of ``hidden`` (N, d) as :func:`reft_core.kernels.apply_edits` does.

    One launch for all edits of a depth, whatever their ranks. False, with nothing changed, where
    an edit is not of the folded form without an activation, or too large.
    """
    if hidden.dtype not in _DTYPES or hidden.stride(-1) != 1:
        return False
    if torch.is_grad_enabled() and hidden.requires_grad:
        return False
    if not all(_is_plain(row_edit, hidden.device) for row_edit in edits):
        return False
    # Edits of one depth change different rows; nothing is known of one without a depth.
    numbered = enumerate(edits)
    depths = groupby(numbered, key=lambda e: (e[1].depth, e[0] if e[1].depth is None else 0))
    for _, group in depths:
        _launch(hidden, [row_edit for _, row_edit in group if len(row_edit.rows)])
    return True


def _launch(hidden: Tensor, group: list[RowEdit]) -> None:
    """Apply edits of different rows."""
    if not group:
        return
    most_rows = max(len(row_edit.rows) for row_edit in group)
    most_ranks = max(row_edit.edit.rank for row_edit in group)
    rank = max(_LEAST_RANK, triton.next_power_of_2(most_ranks))
    entries = [_entry(row_edit) for row_edit in group]
    on_gpu = hidden.is_cuda
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=on_gpu)
    table = table.to(hidden.device, non_blocking=True)
    grid = (len(group), triton.cdiv(most_rows, _ROWS))
    # Triton launches on the current device, which is the first one in a new thread.
    with torch.cuda.device(hidden.device if on_gpu else -1):
        _edit_rows[grid](
            hidden,
            hidden.stride(0),
            table,
            SIZE=hidden.shape[1],
            ROWS=_ROWS,
            RANK=rank,
            COLS=max(16, _TILE // rank),
            num_stages=2,
        )


def _entry(row_edit: RowEdit) -> list[int]:
    """The eight int64 by which the kernel knows an edit. Valid while ``row_edit`` lives."""
    edit, rows = row_edit.edit, row_edit.rows
    assert edit.down is not None
    assert edit.up is not None
    has_row_bias = edit.bias is not None and edit.bias.dim() == 2
    return [
        edit.down.data_ptr(),
        edit.up.data_ptr(),
        0 if edit.bias is None else edit.bias.data_ptr(),
        rows.data_ptr(),
        len(rows),
        edit.rank,
        edit.rank if has_row_bias else 0,
        struct.unpack("<i", struct.pack("<f", row_edit.strength))[0],
    ]


def _is_plain(row_edit: RowEdit, device: torch.device) -> bool:
    """Whether the kernel's formula is the edit's, and its tensors are as the kernel reads them."""
    edit, rows = row_edit.edit, row_edit.rows
    if edit.activation != "identity" or edit.source != "output" or edit.scale != 1.0:
        return False
    if edit.down is None or edit.rank > _MOST_RANK:
        return False
    if edit.skip is not None or edit.shift is not None or edit.gain is not None:
        return False
    if rows.dtype != torch.int64 or not rows.is_contiguous() or rows.device != device:
        return False
    return all(
        part.is_contiguous() and part.dtype == torch.float32 and part.device == device
        for _, part in edit.parts()
    )


@torch.inference_mode()
def check(device: torch.device) -> None:
    """Try the kernel on a small random problem; raises if it does not run or is wrong."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    size, counts, ranks = 200, (3, 17, 1), (1, 5, 16)
    order = torch.randperm(sum(counts) + 4, generator=generator).to(device)
    edits = []
    for count, rank, rows in zip(counts, ranks, order.split((*counts, 4)), strict=False):
        bias = {1: None, 5: draw(5), 16: draw(count, 16)}[rank]
        edit = Edit(down=draw(size, rank) / size, up=draw(rank, size), bias=bias)
        edits.append(RowEdit(edit, rows, 0.5 * rank, depth=0))
    for dtype, tolerance in _TOLERANCE.items():
        hidden = draw(len(order), size).to(dtype)
        expected = hidden.float()
        for row_edit in edits:
            h = expected[row_edit.rows]
            expected[row_edit.rows] = h + row_edit.strength * row_edit.edit.delta(h)
        if not apply_grouped(hidden, edits):
            raise RuntimeError("the kernel does not take the edits it is tried on")
        error = float((hidden.float() - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:
            raise RuntimeError(f"in {dtype} it is off by {error:.2g} of the largest value")

"""A plan's edits applied by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from reft_core.batch import RowEdit
from reft_core.edits import Edit
from reft_core.native.build import FUNCTION_SUFFIXES, load_library


class _RowEdit(Structure):
    """``RowEdit`` of kernels.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("down", "up", "bias", "shift", "gain", "rows")),
        *((name, c_int64) for name in ("num_rows", "rank", "bias_stride", "group")),
        ("strength", c_float),
    )


def apply_natively(hidden: Tensor, edits: Sequence[RowEdit]) -> bool:
    """Change rows of ``hidden`` (N, d) as :func:`reft_core.kernels.apply_edits` does.

    False, with nothing changed, where the kernels are not there or do not compute these edits:
    they know the folded form without an activation, on float32 and bfloat16 states of a CPU.
    """
    if hidden.device.type != "cpu" or hidden.dtype not in FUNCTION_SUFFIXES:
        return False
    library = load_library()
    if library is None or not hidden.is_contiguous():
        return False
    if not all(_is_plain(row_edit.edit) for row_edit in edits):
        return False
    structures = [_as_structure(row_edit, place) for place, row_edit in enumerate(edits)]
    arguments = (_RowEdit * len(edits))(*structures)
    function: Any = getattr(library, f"apply_edits_{FUNCTION_SUFFIXES[hidden.dtype]}")
    function.argtypes, function.restype = [c_void_p, c_int64, c_void_p, c_int64, c_int32], None
    function(hidden.data_ptr(), hidden.shape[1], arguments, len(edits), torch.get_num_threads())
    return True


def _is_plain(edit: Edit) -> bool:
    """Whether the kernels' formula is the edit's."""
    if edit.activation != "identity" or edit.source != "output" or edit.scale != 1.0:
        return False
    return edit.skip is None and all(
        part.is_contiguous() and part.dtype == torch.float32 for _, part in edit.parts()
    )


def _as_structure(row_edit: RowEdit, place: int) -> _RowEdit:
    """The ``place``-th edit for the kernels, valid while ``row_edit`` lives."""
    edit, rows = row_edit.edit, row_edit.rows
    parts = (edit.down, edit.up, edit.bias, edit.shift, edit.gain)
    pointers = (None if part is None else part.data_ptr() for part in parts)
    bias_stride = edit.rank if edit.bias is not None and edit.bias.dim() == 2 else 0
    # Nothing is known of the neighbours of an edit without a depth: a group of its own.
    group = -1 - place if row_edit.depth is None else row_edit.depth
    return _RowEdit(
        *pointers, rows.data_ptr(), len(rows), edit.rank, bias_stride, group, row_edit.strength
    )

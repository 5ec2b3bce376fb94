"""A plan's edits applied by the compiled kernels."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ctypes import c_char, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from reft_core.batch import RowEdit
from reft_core.native.build import FUNCTION_SUFFIXES, load_library, typed

_ROW_EDIT = struct.Struct("@6P4qf4x")
"""``RowEdit`` of edits.hpp. Packed by hand, since this runs for every edit of every layer: an
object of ctypes costs several times as much."""


def apply_natively(hidden: Tensor, edits: Sequence[RowEdit]) -> bool:
    """Change rows of ``hidden`` (N, d) as :func:`reft_core.kernels.apply_edits` does.

    False, with nothing changed, where the kernels are not there or do not compute these edits:
    they know the folded form without an activation, on float32 and bfloat16 states of a CPU.
    """
    if hidden.device.type != "cpu" or hidden.dtype not in FUNCTION_SUFFIXES:
        return False
    function = _function(hidden.dtype)
    if function is None or not hidden.is_contiguous():
        return False
    packed = bytearray(_ROW_EDIT.size * len(edits))
    for place, row_edit in enumerate(edits):
        edit, rows = row_edit.edit, row_edit.rows
        addresses = edit.addresses
        if addresses is None:
            return False
        _ROW_EDIT.pack_into(
            packed,
            _ROW_EDIT.size * place,
            *addresses,
            rows.data_ptr(),
            rows.shape[0],
            edit.rank,
            edit.bias_stride,
            # Nothing is known of the neighbours of an edit without a depth: a group of its own.
            -1 - place if row_edit.depth is None else row_edit.depth,
            row_edit.strength,
        )
    arguments = (c_char * len(packed)).from_buffer(packed)
    function(hidden.data_ptr(), hidden.shape[1], arguments, len(edits), torch.get_num_threads())
    return True


@cache
def _function(dtype: torch.dtype) -> Callable[..., None] | None:
    """``apply_edits`` of kernels.cpp for states of this dtype."""
    library = load_library()
    if library is None:
        return None
    types = c_void_p, c_int64, c_void_p, c_int64, c_int32
    function: Callable[..., None] = typed(
        library, f"apply_edits_{FUNCTION_SUFFIXES[dtype]}", *types
    )
    return function

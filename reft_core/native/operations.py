"""The fused forward's operations by the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from reft_core.engine.attention import DecodeBatch, PrefillBatch
from reft_core.engine.layer import Layer
from reft_core.engine.linear import Linear
from reft_core.engine.operations import HeadLayout, LayerRun, Operations
from reft_core.native.build import FUNCTION_SUFFIXES, load_library, typed
from reft_core.native.layers import NativeLayers
from reft_core.native.linear import NativeLinear

MOST_HEAD_SIZE = 256

_SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [*[c_void_p] * 3, c_int64, c_int64, c_float, c_int32],
    "silu_mul": [*[c_void_p] * 2, c_int64, c_int64, c_int32],
    "attend_decode": [c_void_p],
    "attend_prefill": [c_void_p],
}


class _DecodeArguments(Structure):
    """``DecodeArguments`` of decode.hpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("heads", "cosines", "sines", "keys", "values")),
        *((name, c_void_p) for name in ("positions", "out")),
        *((name, c_int64) for name in ("B", "H", "KH", "D", "slot_len", "window")),
        ("scale", c_float),
        ("threads", c_int32),
    )


class _PrefillArguments(Structure):
    """``PrefillArguments`` of prefill.hpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("heads", "cosines", "sines", "keys", "values")),
        *((name, c_void_p) for name in ("segments", "copies", "out")),
        *((name, c_int64) for name in ("num_segments", "num_copies")),
        *((name, c_int64) for name in ("H", "KH", "D", "slot_len", "window")),
        ("scale", c_float),
        ("threads", c_int32),
    )


class NativeOperations(Operations):
    """See :class:`Operations`. Angles and sums are float32, whatever the dtype."""

    angle_dtype = torch.float32

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._library = library
        self._functions: dict[str, Any] = {}
        for name, types in _SIGNATURES.items():
            self._functions[name] = typed(library, f"{name}_{FUNCTION_SUFFIXES[dtype]}", *types)

    @classmethod
    def where_available(cls, dtype: torch.dtype, head_size: int) -> Operations | None:
        """The operations, if this machine can compile them and they serve these numbers."""
        if dtype not in FUNCTION_SUFFIXES or head_size > MOST_HEAD_SIZE or head_size % 2:
            return None
        library = load_library()
        return None if library is None else cls(library, dtype)

    def linear(self, *maps: nn.Linear) -> Linear:
        """See :class:`Operations`."""
        if NativeLinear.serves(self._library, *maps):
            return NativeLinear(self._library, maps)
        return super().linear(*maps)

    def whole_layers(self, layers: Sequence[Layer]) -> LayerRun | None:
        """See :class:`Operations`."""
        return NativeLayers(self._library, layers) if NativeLayers.serves(layers) else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :class:`Operations`."""
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        self._functions["rms_norm"](
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :class:`Operations`."""
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_rows, width)
        self._functions["silu_mul"](
            gate_up.data_ptr(), out.data_ptr(), num_rows, width, torch.get_num_threads()
        )
        return out

    def attend_decode(
        self,
        heads: Tensor,
        layout: HeadLayout,
        cos: Tensor,
        sin: Tensor,
        batch: DecodeBatch,
    ) -> Tensor:
        """See :class:`Operations`."""
        assert batch.store_at is None, "on a CPU, keys are stored at their positions"
        keys, values = batch.kv.keys[layout.layer], batch.kv.values[layout.layer]
        num_rows, _, head_size = heads.shape
        out = heads.new_empty(num_rows, layout.num_queries * head_size)
        arguments = _DecodeArguments(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(),
            batch.positions.data_ptr(), out.data_ptr(), num_rows, layout.num_queries,
            layout.num_keys, head_size, batch.kv.slot_len, layout.window or 0, layout.scale,
            torch.get_num_threads(),
        )  # fmt: skip
        self._functions["attend_decode"](byref(arguments))
        return out

    def attend_prefill(
        self,
        heads: Tensor,
        layout: HeadLayout,
        cos: Tensor,
        sin: Tensor,
        batch: PrefillBatch,
    ) -> Tensor:
        """See :class:`Operations`."""
        keys, values = batch.kv.keys[layout.layer], batch.kv.values[layout.layer]
        num_rows, _, head_size = heads.shape
        out = heads.new_empty(num_rows, layout.num_queries * head_size)
        segments, copies = batch.packed
        arguments = _PrefillArguments(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(),
            segments.buffer_info()[0], copies.buffer_info()[0], out.data_ptr(),
            len(batch.segments), len(batch.copied), layout.num_queries, layout.num_keys, head_size,
            batch.kv.slot_len, layout.window or 0, layout.scale, torch.get_num_threads(),
        )  # fmt: skip
        self._functions["attend_prefill"](byref(arguments))
        return out

"""Whole layers of the fused forward by one call of the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from reft_core.engine.attention import DecodeBatch, ForwardBatch, PrefillBatch
from reft_core.engine.layer import Layer
from reft_core.native.build import FUNCTION_SUFFIXES, typed
from reft_core.native.linear import NativeLinear

_LINEARS = ("qkv", "out", "gate_up", "down")


class _LayerWeights(Structure):
    """``LayerWeights`` of layers.hpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((f"{name}_{part}", c_void_p) for name in _LINEARS for part in ("packed", "bias")),
        ("window", c_int64),
        *((name, c_float) for name in ("scale", "attention_eps", "mlp_eps")),
        *((name, c_float) for name in ("query_eps", "key_eps")),
    )


class _LayersArguments(Structure):
    """``LayersArguments`` of layers.hpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("hidden", "cosines", "sines", "keys", "values")),
        *((name, c_void_p) for name in ("positions", "segments", "copies", "rows", "scratch")),
        *((name, c_int64) for name in ("num_segments", "num_copies", "num_rows")),
        *((name, c_int64) for name in ("N", "d", "W", "H", "KH", "D", "slot_len")),
        ("threads", c_int32),
    )


class NativeLayers:
    """Layers without edits inside them. Serves one forward at a time.

    Computes what the layers do, one kernel after the other, without a stop in Python between them;
    and keeps the memory of what is between, which takes longer to get than to fill.
    """

    def __init__(self, library: CDLL, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)  # owns what the addresses point to
        self._weights = (_LayerWeights * len(layers))(*map(_weights, layers))
        dtype = layers[0].before_attention.weight.dtype
        self._run = typed(
            library, f"run_layers_{FUNCTION_SUFFIXES[dtype]}",
            c_void_p, c_int64, c_int64, c_void_p,
        )  # fmt: skip
        layout = layers[0].layout
        self._heads = layout.num_queries, layout.num_keys, layers[0].head_dim
        self._width = layers[0].width
        self._scratch = torch.empty(0, dtype=dtype)

    @staticmethod
    def serves(layers: Sequence[Layer]) -> bool:
        """Whether all layers are of one shape, and of what the kernels compute."""
        shapes = {
            (each.layout.num_queries, each.layout.num_keys, each.head_dim, each.width)
            for each in layers
        }
        of_kernels = all(isinstance(m, NativeLinear) for each in layers for m in each.linears)
        return of_kernels and len(shapes) == 1 and not any(each.activation for each in layers)

    def __call__(
        self,
        first: int,
        last: int,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """h (N, d), changed from what goes into layer ``first`` to what comes out of ``last - 1``.

        With ``rows`` (R,), int64 and ascending, the last layer goes on with those alone once it
        has stored its keys and values, and the result is the first R rows of h.
        """
        num_queries, num_keys, head_dim = self._heads
        num_rows, d = h.shape
        between = max((2 * num_queries + 2 * num_keys) * head_dim, 3 * self._width)
        if self._scratch.numel() < num_rows * (d + between):
            self._scratch = h.new_empty(num_rows * (d + between))
        assert isinstance(batch, DecodeBatch | PrefillBatch), "there are no others"
        keys, values = batch.kv.addresses
        positions = segments = copies = None
        num_segments = num_copies = 0
        if isinstance(batch, DecodeBatch):
            assert batch.store_at is None, "on a CPU, keys are stored at their positions"
            positions = batch.positions.data_ptr()
        else:
            segments, copies = (numbers.buffer_info()[0] for numbers in batch.packed)
            num_segments, num_copies = len(batch.segments), len(batch.copied)
        arguments = _LayersArguments(
            h.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.buffer_info()[0],
            values.buffer_info()[0], positions, segments, copies,
            None if rows is None else rows.data_ptr(), self._scratch.data_ptr(),
            num_segments, num_copies, 0 if rows is None else len(rows), num_rows, d,
            self._width, num_queries, num_keys, head_dim, batch.kv.slot_len,
            torch.get_num_threads(),
        )  # fmt: skip
        self._run(self._weights, first, last, byref(arguments))
        return h if rows is None else h[: len(rows)]


def _weights(layer: Layer) -> _LayerWeights:
    norms = [layer.before_attention, layer.before_mlp, *(layer.head_norms or ())]
    addresses = [norm.weight.data_ptr() for norm in norms]
    eps = [norm.eps for norm in norms]
    found = _LayerWeights(*addresses)
    found.window, found.scale = layer.layout.window or 0, layer.layout.scale
    found.attention_eps, found.mlp_eps = eps[:2]
    if layer.head_norms is not None:
        found.query_eps, found.key_eps = eps[2:]
    for name, linear in zip(_LINEARS, layer.linears, strict=True):
        assert isinstance(linear, NativeLinear), "the kernels compute it"
        packed, bias = linear.addresses
        setattr(found, f"{name}_packed", packed)
        setattr(found, f"{name}_bias", bias)
    return found

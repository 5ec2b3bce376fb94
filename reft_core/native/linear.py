"""Linear maps by the compiled kernels."""

from __future__ import annotations

from ctypes import CDLL, Structure, byref, c_int32, c_int64, c_void_p

import torch
from torch import Tensor, nn

from reft_core.native.build import FUNCTION_SUFFIXES, typed


class _ProductArguments(Structure):
    """``ProductArguments`` of products.hpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "packed", "bias", "other", "to")),
        *((name, c_int64) for name in ("N", "in", "out")),
        ("threads", c_int32),
    )


class NativeLinear:
    """x Wᵀ + b for the rows of one or several linear maps, one below the other.

    The weights are laid out so that few rows, as a decode step has, read them once and in order.
    A row comes out the same to the last bit whatever rows stand beside it.
    """

    def __init__(self, library: CDLL, maps: tuple[nn.Linear, ...]) -> None:
        weight = torch.cat([linear.weight for linear in maps]).contiguous()
        suffix = FUNCTION_SUFFIXES[weight.dtype]
        self._out, self._in = weight.shape
        num_padded = typed(library, "padded_outputs", c_int64, result=c_int64)(self._out)
        self._packed = weight.new_empty(num_padded, self._in)
        pointers = weight.data_ptr(), self._out, self._in, self._packed.data_ptr()
        types = c_void_p, c_int64, c_int64, c_void_p, c_int32
        pack = typed(library, f"pack_weight_{suffix}", *types)
        pack(*pointers, torch.get_num_threads())
        biases: list[Tensor] = [linear.bias for linear in maps if linear.bias is not None]
        self._bias = torch.cat(biases).contiguous() if biases else None
        self._multiply = typed(library, f"multiply_{suffix}", c_void_p)
        self.num_bytes = self._packed.numel() * self._packed.itemsize

    @staticmethod
    def serves(library: CDLL, *maps: nn.Linear) -> bool:
        """Whether the kernels compute these maps, and nothing does so better.

        A processor that multiplies whole matrices of bfloat16 at once is left to oneDNN.
        """
        weights = [linear.weight for linear in maps]
        if weights[0].dtype == torch.float32:
            return True
        pairs_up = weights[0].shape[1] % 2 == 0
        return pairs_up and not typed(library, "has_matrix_instructions", result=c_int32)()

    @property
    def addresses(self) -> tuple[int, int | None]:
        """Of the packed weights, and of the bias if there is one."""
        return self._packed.data_ptr(), None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """Of x (N, in), as (N, out)."""
        return self._product(x, None)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The same added to ``other`` (N, out), rounded once."""
        return self._product(x, other)

    def _product(self, x: Tensor, other: Tensor | None) -> Tensor:
        x = x.contiguous()
        num_rows = len(x)
        out = x.new_empty(num_rows, self._out)
        arguments = _ProductArguments(
            x.data_ptr(), *self.addresses, None if other is None else other.data_ptr(),
            out.data_ptr(), num_rows, self._in, self._out, torch.get_num_threads(),
        )  # fmt: skip
        self._multiply(byref(arguments))
        return out

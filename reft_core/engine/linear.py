"""One or several linear maps as one product, x Wᵀ + b of their rows one below the other."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_PACK_ROWS = 16
"""Rows for which oneDNN chooses its layout; it serves all numbers of rows about as well."""


class Linear(Protocol):
    """The product, whoever computes it."""

    num_bytes: int
    """Bytes it takes beside the model's own."""

    def __call__(self, x: Tensor) -> Tensor:
        """Of x (N, in), as (N, out)."""

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The same added to ``other`` (N, out)."""


class PackedLinear:
    """By oneDNN, from a copy of the weights that is laid out for its kernels."""

    def __init__(self, *maps: nn.Linear) -> None:
        weight = torch.cat([linear.weight for linear in maps])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        biases: list[Tensor] = [linear.bias for linear in maps if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self.num_bytes = weight.numel() * weight.itemsize

    @staticmethod
    def serves(dtype: torch.dtype) -> bool:
        """Whether this machine has the kernels."""
        if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return False
        return dtype == torch.float32 or (
            dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )

    def __call__(self, x: Tensor) -> Tensor:
        """See :class:`Linear`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return product

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """See :class:`Linear`. Rounded once."""
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._weight, self._bias, "add"
        )
        return total


class JoinedLinear:
    """By torch, on devices whose weights need no packing.

    A GPU's memory is too dear for a second copy of the weights. So the joined weight becomes the
    storage, and the maps' own weights become views of it: transformers' code, which runs whatever
    the fused forward does not, reads the same memory. The maps are changed for good.
    """

    num_bytes = 0

    def __init__(self, *maps: nn.Linear) -> None:
        self._weight = maps[0].weight.data
        if len(maps) > 1:
            self._weight = torch.cat([linear.weight.data for linear in maps])
            sizes = [linear.out_features for linear in maps]
            for linear, rows in zip(maps, self._weight.split(sizes), strict=True):
                linear.weight.data = rows
        biases: list[Tensor] = [linear.bias.data for linear in maps if linear.bias is not None]
        assert len(biases) in (0, len(maps)), "all maps have a bias, or none"
        self._bias = torch.cat(biases) if biases else None

    @staticmethod
    def serves(model: PreTrainedModel) -> bool:
        """Whether the model's linear maps are plain products of plain numbers."""
        linears = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
        return linears == {nn.Linear} and next(model.parameters()).dtype in _DTYPES

    def __call__(self, x: Tensor) -> Tensor:
        """See :class:`Linear`."""
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """See :class:`Linear`."""
        if self._bias is not None:
            return self(x).add_(other)
        return torch.addmm(other, x, self._weight.mT)

"""Linear maps of a model joined into one product, on devices whose weights need no packing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class JoinedLinear:
    """x Wᵀ + b for the rows of one or several linear maps, one below the other.

    A GPU's memory is too dear for a second copy of the weights. So the joined weight becomes the
    storage, and the maps' own weights become views of it: transformers' code, which runs whatever
    the fused forward does not, reads the same memory. The maps are changed for good.
    """

    num_bytes = 0
    """Bytes it takes beside the model's own."""

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
        """Of x (N, in), as (N, out)."""
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The same added to ``other`` (N, out)."""
        if self._bias is not None:
            return self(x).add_(other)
        return torch.addmm(other, x, self._weight.mT)

"""A model of transformers, with PEFT's parts in it or without, that trains as ours do.

It takes our own batches, so every method sees the same tokens and learns from the same cells.
PEFT's virtual tokens cannot be told where each row begins, and positions must count from a
row's first token: so rows are moved to the left edge and padded on the right.

Dimension letters as in :mod:`trainer.collate`; N cells that carry loss, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from trainer.collate import IGNORED
from trainer.frozen import FrozenBase
from trainer.reft_model import LossAndLogits


class BaselineModel(FrozenBase):
    """``wrapped`` around ``base``, in the form that :func:`trainer.fit.fit` trains.

    The parameters of either that are ``tuned`` are trained. It stays in eval mode, as no method
    here drops anything out.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        wrapped: nn.Module,
        tuned: Sequence[nn.Parameter] = (),
        num_virtual: int = 0,
    ) -> None:
        """``num_virtual`` columns of hidden states stand before the rows' own."""
        super().__init__(base, tuned)
        self.wrapped = wrapped.eval()
        self._num_virtual = num_virtual

    @property
    @override
    def trained_parts(self) -> list[nn.Module]:
        return [self.tuned]

    @property
    def interventions(self) -> list[nn.Module]:
        """None that edits states."""
        return []

    @override
    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return self

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        **_edited: Tensor,
    ) -> LossAndLogits:
        """Loss and logits of a :class:`trainer.collate.Batch`; nothing is edited."""
        tokens, mask, rows, columns = to_left_edge(input_ids, attention_mask, labels)
        columns = columns + self._num_virtual

        def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][rows, columns].unsqueeze(0), *args[1:])  # (1, N, d)

        handle = self.base.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits = self.wrapped(input_ids=tokens, attention_mask=mask).logits[0]  # (N, V)
        finally:
            handle.remove()
        loss = F.cross_entropy(logits.float(), labels[labels != IGNORED])
        return LossAndLogits(loss=loss, logits=logits)


def to_left_edge(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch's tokens and mask (B, T) with every row begun in column 0.

    And row and column (N,) of the cells that predict what ``labels`` (B, C) hold, row by row.
    """
    width = input_ids.shape[1]
    start = attention_mask.argmax(dim=1)  # (B,)
    source = torch.arange(width, device=start.device) + start[:, None]  # (B, T)
    inside = source < width
    source = source.clamp(max=width - 1)
    mask = attention_mask.gather(1, source) * inside
    rows, answers = (labels != IGNORED).nonzero(as_tuple=True)
    columns = width - labels.shape[1] + answers - start[rows]
    return input_ids.gather(1, source) * mask, mask, rows, columns

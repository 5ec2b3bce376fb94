"""A frozen encoder with trainable interventions and a trainable head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from reft_core.classification.heads import pool
from reft_core.methods.placement import Placement
from reft_core.sites import find_layers
from trainer.classify.head import TrainableHead
from trainer.frozen import FrozenBase
from trainer.interventions import Cells, Interventions, with_unused
from trainer.reft_model import LossAndLogits


class ClassifierModel(FrozenBase):
    """Interventions where ``placement`` puts them and a head; the encoder never changes.

    Autograd records nothing below the first edited layer, since nothing there needs a gradient.
    Without interventions (``placement`` None) and tuned parameters the pooled states never
    change: they are computed once a text and kept.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        placement: Placement | None,
        head: TrainableHead,
        *,
        num_units: int,
        head_learning_rate: float | None = None,
        max_bytes: int = 2**30,
        tuned: Sequence[nn.Parameter] = (),
    ) -> None:
        """Without a rate of its own the head is trained with the interventions'.

        Pooled states take at most about ``max_bytes``; the rest is computed each time.
        """
        super().__init__(base, tuned)
        self.placement = placement
        self._head_learning_rate = head_learning_rate
        self.interventions = Interventions(find_layers(base), placement, num_units)
        self.head = head
        self._most_kept = max_bytes // (4 * base.config.hidden_size)
        self._kept: dict[tuple[int, ...], Tensor] | None = None if placement or tuned else {}

    @property
    @override
    def trained_parts(self) -> list[nn.Module]:
        return [self.tuned, self.interventions, self.head]

    @override
    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The interventions' parameters and the base's tuned ones, and the head's."""
        of_head = self._head_learning_rate or learning_rate
        edits = [*self.tuned, *self.interventions.parameters()]
        groups = [
            {"params": edits, "lr": learning_rate},
            {"params": list(self.head.parameters()), "lr": of_head},
        ]
        return [group for group in groups if group["params"]]

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        cells: Sequence[Cells | None],
        token_type_ids: Tensor | None = None,
    ) -> LossAndLogits:
        """Loss and logits (B, L) of a :class:`trainer.classify.rows.TextBatch`."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self._kept is None:
            with self.interventions.hooked(cells) as unused:
                pooled = self._pooled(inputs)
        else:
            unused, pooled = [], self._kept_pooled(self._kept, inputs)
        logits = self.head(pooled)
        loss = with_unused(self.head.loss(logits, labels), unused)
        return LossAndLogits(loss=loss, logits=logits)

    def _pooled(self, inputs: dict[str, Tensor]) -> Tensor:
        """Pooled states (B, d)."""
        output: Any = self.base(**inputs)
        return pool(self.head.spec.pooling, output, inputs["attention_mask"])

    def _kept_pooled(
        self, kept: dict[tuple[int, ...], Tensor], inputs: dict[str, Tensor]
    ) -> Tensor:
        """Pooled states (B, d), of which those known from earlier are not computed again."""
        told = torch.stack(list(inputs.values()), dim=2)  # (B, T, 2 or 3)
        texts = [
            tuple(row[mask.bool()].flatten().tolist())
            for row, mask in zip(told, inputs["attention_mask"], strict=True)
        ]
        new = [row for row, text in enumerate(texts) if text not in kept]
        found = {}
        if new:
            with torch.no_grad():
                pooled = self._pooled({name: value[new] for name, value in inputs.items()})
            found = {texts[row]: state for row, state in zip(new, pooled, strict=True)}
            if len(kept) + len(found) <= self._most_kept:
                kept |= found
        return torch.stack([found[text] if text in found else kept[text] for text in texts])

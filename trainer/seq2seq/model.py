"""A frozen encoder-decoder with trainable interventions on its encoder.

Dimension letters: B rows, T prompt tokens, C target tokens, N target tokens in the batch that
are no padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from reft_core.methods.placement import Placement
from reft_core.sites import find_layers
from trainer.collate import IGNORED
from trainer.frozen import FrozenBase
from trainer.interventions import Cells, Interventions, with_unused
from trainer.reft_model import LossAndLogits


class Seq2SeqModel(FrozenBase):
    """Interventions where ``placement`` puts them in the encoder, as serving edits it.

    Autograd records nothing below the first edited layer and nothing of the decoder but what
    reads the encoder; logits are computed only for target tokens.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        placement: Placement | None,
        *,
        num_units: int,
        tuned: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__(base, tuned)
        layers = () if placement is None else _encoder_layers(base, placement)
        self.interventions = Interventions(layers, placement, num_units)
        # Not registered here: it belongs to the base.
        self._head: Callable[[], nn.Module] = base.get_output_embeddings

    @property
    @override
    def trained_parts(self) -> list[nn.Module]:
        return [self.tuned, self.interventions]

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        cells: Sequence[Cells | None],
    ) -> LossAndLogits:
        """Loss and logits (N, V) of a :class:`trainer.seq2seq.rows.Seq2SeqBatch`."""
        is_target = labels != IGNORED  # (B, C)
        with self.interventions.hooked(cells) as unused, self._logits_of(is_target):
            logits = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=self.base.prepare_decoder_input_ids_from_labels(labels),
                use_cache=False,
            ).logits[0]  # (N, V)
        loss = F.cross_entropy(logits.float(), labels[is_target])
        return LossAndLogits(loss=with_unused(loss, unused), logits=logits)

    @contextmanager
    def _logits_of(self, is_target: Tensor) -> Iterator[None]:
        """While open, the output layer sees the target tokens alone."""

        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][is_target].unsqueeze(0), *args[1:])  # (1, N, d)

        handle = self._head().register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


def _encoder_layers(base: PreTrainedModel, placement: Placement) -> Sequence[nn.Module]:
    return find_layers(base.get_encoder(), placement.model.num_layers)

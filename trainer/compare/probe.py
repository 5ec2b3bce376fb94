"""Head only: a linear map on the frozen base's last hidden state of the last prompt token.

Dimension letters as in :mod:`trainer.collate`; L labels, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from reft_core.classification.labels import Tokens
from trainer.collate import IGNORED, Collator
from trainer.compare.baseline import to_left_edge
from trainer.data import TokenisedExample
from trainer.fit import batches
from trainer.frozen import FrozenBase
from trainer.reft_model import LossAndLogits


class ProbeModel(FrozenBase):
    """Softmax regression on features that are computed once and kept.

    Features are normed to mean 0 and variance 1 over their own dimensions, as a few of a
    model's are many times the others.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        answers: Mapping[str, Tokens],
        features: dict[Tokens, Tensor],
    ) -> None:
        """``answers``: each label's tokens as a row's whole completion; ``features``: the normed
        states (d,) in float32 that are known, by prompt, to which this adds."""
        super().__init__(base)
        self.labels = list(answers)
        self._index = {tokens: index for index, tokens in enumerate(answers.values())}
        self._features = features
        width: int = base.config.get_text_config(decoder=True).hidden_size
        self.head = nn.Linear(width, len(self.labels), device=base.device)

    @property
    @override
    def trained_parts(self) -> list[nn.Module]:
        return [self.head]

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        **_edited: Tensor,
    ) -> LossAndLogits:
        """Mean loss over the rows of a :class:`trainer.collate.Batch`, and logits (B, L)."""
        logits = self._logits(input_ids, attention_mask, labels)
        wanted = [self._index[tuple(t for t in row if t != IGNORED)] for row in labels.tolist()]
        loss = F.cross_entropy(logits, torch.tensor(wanted, device=logits.device))
        return LossAndLogits(loss=loss, logits=logits)

    @torch.no_grad()
    def choose(
        self, rows: Sequence[TokenisedExample], collator: Collator, *, batch_size: int
    ) -> list[str]:
        """The label of the highest logit for each row, whose completion is not looked at."""
        found: list[int] = []
        for batch in batches(rows, batch_size, collator, self.device):
            logits = self._logits(batch["input_ids"], batch["attention_mask"], batch["labels"])
            found += logits.argmax(dim=1).tolist()
        return [self.labels[index] for index in found]

    def _logits(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        tokens, mask, rows, columns = to_left_edge(input_ids, attention_mask, labels)
        last = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        # The first cell of a row that carries loss is its prompt's last token.
        last.scatter_reduce_(0, rows, columns, "amin", include_self=False)
        logits: Tensor = self.head(self._states(tokens, mask, last))  # (B, L)
        return logits

    @torch.no_grad()
    def _states(self, tokens: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        """The normed state (B, d) in column ``last`` (B,) of each row, kept by its prompt."""
        prompts = [
            tuple(row[: end + 1]) for row, end in zip(tokens.tolist(), last.tolist(), strict=True)
        ]
        new = [row for row, prompt in enumerate(prompts) if prompt not in self._features]
        if new:
            states = self.base.base_model(
                input_ids=tokens[new], attention_mask=mask[new]
            ).last_hidden_state
            for place, row in enumerate(new):
                state = states[place, last[row]].float()
                self._features[prompts[row]] = F.layer_norm(state, state.shape)
        return torch.stack([self._features[prompt] for prompt in prompts])

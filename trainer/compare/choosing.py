"""Which label a model finds the likeliest, for every method by the same few forwards.

A label's probability is at most that of its first token, so labels are scored whole only while
that bound leaves them a chance. The outcome is that of scoring all of them, as
:func:`trainer.evaluation.splits.likeliest_labels` does; a trained model, sure of its answer,
needs about one label of each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_core.classification.labels import Tokens
from trainer.collate import IGNORED, Collator
from trainer.data import TokenisedExample
from trainer.fit import batches
from trainer.reft_model import LossAndLogits

_SLACK = 0.05
"""Added to a bound, which must hold although another batch rounds otherwise (bfloat16)."""


class Scorer(Protocol):
    """A model that gives logits for the cells of a batch that carry loss."""

    @property
    def device(self) -> torch.device:
        """Where batches are to be."""

    def __call__(self, **batch: Any) -> LossAndLogits:
        """Loss and logits of a batch."""


@torch.no_grad()
def choose_labels(
    model: Scorer,
    rows: Sequence[TokenisedExample],
    answers: Mapping[str, Tokens],
    collator: Collator,
    *,
    batch_size: int,
) -> list[str]:
    """For each row the label whose tokens in ``answers`` the model finds the likeliest."""
    labels = list(answers)
    bounds = _first_token_bounds(model, rows, answers, collator, batch_size)  # (n, L)
    best = torch.full((len(rows),), -torch.inf)
    chosen = torch.full((len(rows),), len(labels))
    open_bounds = bounds.clone()
    while True:
        top, candidates = open_bounds.max(dim=1)
        # At equal probability the first label wins, so one that could tie is scored too.
        todo = (top >= best).logical_and(top > -torch.inf).nonzero().flatten().tolist()
        if not todo:
            return [labels[index] for index in chosen.tolist()]
        asked = [
            TokenisedExample(rows[row].prompt, answers[labels[candidates[row]]]) for row in todo
        ]
        losses = row_losses(model, asked, collator, batch_size)
        for row, (loss, _) in zip(todo, losses, strict=True):
            score, candidate = -loss, int(candidates[row])
            open_bounds[row, candidate] = -torch.inf
            if score > best[row] or (score == best[row] and candidate < chosen[row]):
                best[row], chosen[row] = score, candidate


def _first_token_bounds(
    model: Scorer,
    rows: Sequence[TokenisedExample],
    answers: Mapping[str, Tokens],
    collator: Collator,
    batch_size: int,
) -> Tensor:
    """Log-probability (n, L) of each label's first token after each row's prompt, on the CPU."""
    first = torch.tensor([answer[0] for answer in answers.values()])
    asked = [TokenisedExample(row.prompt, (int(first[0]),)) for row in rows]
    found = [
        F.log_softmax(model(**batch)["logits"].float(), dim=-1).cpu()[:, first]
        for batch in batches(asked, batch_size, collator, model.device)
    ]
    return torch.cat(found) + _SLACK


@torch.no_grad()
def row_losses(
    model: Scorer, rows: Sequence[TokenisedExample], collator: Collator, batch_size: int
) -> Iterator[tuple[float, int]]:
    """Loss of each row's completion, summed over its tokens, and their number."""
    for batch in batches(rows, batch_size, collator, model.device):
        is_answer = batch["labels"] != IGNORED  # (B, C)
        losses = F.cross_entropy(
            model(**batch)["logits"].float(), batch["labels"][is_answer], reduction="none"
        )
        summed = torch.zeros(is_answer.shape, device=losses.device)
        summed[is_answer] = losses
        yield from zip(summed.sum(dim=1).tolist(), is_answer.sum(dim=1).tolist(), strict=True)
